from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from common import files
from common.engines import SemiSupervisedTrainer
from common.errors import BadInput
from common.files import temporary_name
from common.handlers import Checkpoint
from common.methods import Method
from common.networks import read_weights, save_weights


class Counter(Method):
    """Its weight is the number of steps done; ``at`` steps something may happen to it."""

    def __init__(self, size: int = 1, at: dict | None = None) -> None:
        super().__init__()
        self.network = nn.Linear(1, size, bias=False)
        nn.init.zeros_(self.network.weight)
        self.at = at or {}

    def forward(self, batch, optimizer=""):
        return {"loss": -self.network.weight.sum()}

    def after_step(self) -> None:
        if self.step + 1 in self.at:
            self.at[self.step + 1](self.network)


class PowerCut(Exception):
    """Stands for anything that ends a process."""


def cut(network: nn.Module) -> None:
    raise PowerCut


def spoil(network: nn.Module) -> None:
    with torch.no_grad():
        network.weight[0] = math.nan


class Validation:
    """An evaluator that finds what it is told, once an epoch."""

    def __init__(self, *values: float, better=lambda now, best: now > best) -> None:
        self.values = iter(values)
        self.evaluator = Engine(self._find)
        self.evaluator.metric_cmp_fn = better

    def _find(self, engine: Engine, batch: int) -> None:
        engine.state.key_metric_name = "val_mean_dice"
        engine.state.metrics["val_mean_dice"] = next(self.values)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.evaluator.run([0], 1))


def train(
    folder: Path, method: Method | None = None, epochs: int = 4, validation: Validation | None = None, **settings
):
    """One step an epoch with a learning rate of 1."""
    method = method or Counter()
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0, momentum=settings.pop("momentum", 0.0))
    checkpoint = Checkpoint(
        {"method": method, "optimizer": optimizer},
        method.network,
        str(folder / "output"),
        str(folder / "models" / "model.pt"),
        evaluator=validation.evaluator if validation else None,
        **settings,
    )
    handlers = [validation, checkpoint] if validation else [checkpoint]
    trainer = SemiSupervisedTrainer("cpu", epochs, [{}], method, optimizer, False, None, train_handlers=handlers)
    trainer.run()
    return checkpoint


def deployed(folder: Path) -> float:
    return read_weights(folder / "models" / "model.pt")["weight"][0].item()


def leave_older_weights(folder: Path, value: float = -7.0) -> bytes:
    save_weights({"weight": torch.tensor([[value]])}, folder / "models" / "model.pt")
    return (folder / "models" / "model.pt").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_weights_to_use_are_those_of_the_last_epoch(tmp_path):
    train(tmp_path)
    assert deployed(tmp_path) == 4.0
    assert list(torch.load(tmp_path / "models" / "model.pt", weights_only=True)) == ["model"]
    assert names(tmp_path) == ["models/model.pt", "output/checkpoint.pt"]


def test_model_is_replaced_at_the_very_end_only(tmp_path):
    old = leave_older_weights(tmp_path)
    with pytest.raises(PowerCut):
        train(tmp_path, Counter(at={4: cut}))
    assert (tmp_path / "models" / "model.pt").read_bytes() == old
    saved = torch.load(tmp_path / "output" / "checkpoint.pt", weights_only=True)
    assert (saved["epoch"], saved["iteration"]) == (3, 3)
    assert saved["state"]["method"]["network.weight"].item() == 3.0
    train(tmp_path)
    assert deployed(tmp_path) == 4.0


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    old = leave_older_weights(tmp_path)
    with pytest.raises(BadInput, match="NaN or infinite number in 'weight'"):
        train(tmp_path, Counter(at={4: spoil}))
    assert (tmp_path / "models" / "model.pt").read_bytes() == old
    saved = torch.load(tmp_path / "output" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["method"]["network.weight"].item() == 3.0, "there is a way back"


def test_weights_that_are_not_finite_are_never_the_best(tmp_path):
    """The validation may well like them: a NaN need not show in the labels."""
    with pytest.raises(BadInput, match="NaN or infinite"):
        train(tmp_path, Counter(at={2: spoil}), validation=Validation(0.5, 0.9), select="best")
    assert read_weights(tmp_path / "output" / "best.pt")["weight"].item() == 1.0
    assert not (tmp_path / "models" / "model.pt").exists()


def test_disk_that_is_full_while_a_checkpoint_is_written(tmp_path, full_disk):
    old = leave_older_weights(tmp_path)
    train_folder = tmp_path / "output"
    train_folder.mkdir()
    (train_folder / "checkpoint.pt").write_bytes(b"of an earlier run")
    with full_disk(2000), pytest.raises(BadInput, match=r"checkpoint\.pt: can't be written"):
        train(tmp_path, Counter(size=2000))
    assert (train_folder / "former_checkpoint.pt").read_bytes() == b"of an earlier run"
    assert (tmp_path / "models" / "model.pt").read_bytes() == old
    assert names(tmp_path) == ["models/model.pt", "output/former_checkpoint.pt"]


def test_what_killed_runs_were_writing_takes_no_room_for_good(tmp_path):
    train(tmp_path)
    for name in ("output/checkpoint.pt", "output/best.pt", "models/model.pt"):
        temporary_name(tmp_path / name).write_bytes(b"half")
    others = [temporary_name(tmp_path / "output" / "summary.json"), tmp_path / "output" / ".checkpoint.pt.my.tmp"]
    for path in others:  # somebody may be writing these
        path.write_bytes(b"half")
    train(tmp_path, resume=True)
    expected = ["models/model.pt", "output/checkpoint.pt", *(str(path.relative_to(tmp_path)) for path in others)]
    assert names(tmp_path) == sorted(expected)


def test_disk_that_is_full_while_the_weights_are_written(tmp_path, monkeypatch):
    old = leave_older_weights(tmp_path)
    replace = files.os.replace

    def fail_for_the_weights(source, target):
        if Path(target).name == "model.pt":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_for_the_weights)
    with pytest.raises(BadInput, match=r"model\.pt: can't be written \(No space left on device\)"):
        train(tmp_path)
    assert (tmp_path / "models" / "model.pt").read_bytes() == old
    assert names(tmp_path) == ["models/model.pt", "output/checkpoint.pt"]


@pytest.mark.parametrize(
    ("values", "better", "expected"),
    [
        ((0.5, 0.9, 0.7, 0.9), lambda now, best: now > best, 2.0),
        ((0.5, 0.9, 0.7, 0.2), lambda now, best: now < best, 4.0),
        ((math.nan, 0.1, math.nan, 0.05), lambda now, best: now > best, 2.0),
        ((math.nan,) * 4, lambda now, best: now > best, 4.0),
    ],
    ids=["higher is better", "lower is better", "undefined now and then", "never defined: the last"],
)
def test_select_best(tmp_path, values, better, expected):
    train(tmp_path, validation=Validation(*values, better=better), select="best")
    assert deployed(tmp_path) == expected


def test_select_last_does_not_care_for_the_validation(tmp_path):
    train(tmp_path, validation=Validation(0.9, 0.1, 0.1, 0.1), select="last")
    assert deployed(tmp_path) == 4.0
    assert not (tmp_path / "output" / "best.pt").exists()


def test_best_is_remembered_by_a_resumed_run(tmp_path):
    with pytest.raises(PowerCut):
        train(tmp_path, Counter(at={3: cut}), validation=Validation(0.9, 0.5), select="best")
    train(tmp_path, validation=Validation(0.7, 0.8), select="best", resume=True)
    assert deployed(tmp_path) == 1.0


def test_best_of_an_earlier_run_is_forgotten_by_a_new_one(tmp_path):
    train(tmp_path, validation=Validation(0.9, 0.5, 0.5, 0.5), select="best")
    train(tmp_path, Counter(), validation=Validation(*[math.nan] * 4), select="best")
    assert deployed(tmp_path) == 4.0


def test_resume_goes_on_where_the_run_stopped(tmp_path):
    with pytest.raises(PowerCut):
        train(tmp_path, Counter(at={4: cut}), epochs=6)
    asked = []
    method = Counter(at={step: lambda network: asked.append(network.weight.item()) for step in range(1, 7)})
    train(tmp_path, method, epochs=6, resume=True)
    assert asked == [4.0, 5.0, 6.0]
    assert deployed(tmp_path) == 6.0


def test_a_run_cannot_be_resumed_for_longer_than_it_was_begun_for(tmp_path):
    train(tmp_path, epochs=2)
    with pytest.raises(BadInput, match=r"begun for 2 epochs.*found max_epochs 4.*--train#trainer#max_epochs 2"):
        train(tmp_path, epochs=4, resume=True)
    assert deployed(tmp_path) == 2.0


def test_a_run_in_bf16_is_resumed_where_losses_are_scaled_and_the_other_way_round(tmp_path):
    """A scaler's state is empty where nothing was scaled, which torch refuses to load."""
    train(tmp_path)
    path = tmp_path / "output" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["scaler"] == {}
    torch.save({**saved, "scaler": torch.amp.GradScaler("cpu").state_dict()}, path)
    train(tmp_path, resume=True)


def test_a_run_that_ended_before_its_first_checkpoint_is_not_resumed_from_a_former_one(tmp_path):
    train(tmp_path, validation=Validation(0.9, 0.5, 0.5, 0.5), select="best")
    with pytest.raises(PowerCut):
        train(tmp_path, Counter(at={1: cut}), validation=Validation(0.5), select="best")
    kept = ["models/model.pt", "output/former_best.pt", "output/former_checkpoint.pt"]
    assert names(tmp_path) == kept, "who forgot --resume true has lost nothing yet"
    train(tmp_path, validation=Validation(0.1, 0.2, 0.8, 0.3), select="best", resume=True)
    assert deployed(tmp_path) == 3.0, "neither the former run's last weights nor its best"
    assert names(tmp_path) == ["models/model.pt", "output/best.pt", "output/checkpoint.pt"]


def test_the_scale_of_losses_is_resumed(tmp_path, monkeypatch):
    made = []
    doubling = partial(torch.amp.GradScaler, "cpu", init_scale=8.0, growth_interval=1)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: made.append(doubling()) or made[-1])
    with pytest.raises(PowerCut):
        train(tmp_path, Counter(at={3: cut}))
    assert torch.load(tmp_path / "output" / "checkpoint.pt", weights_only=True)["scaler"]["scale"] == 32.0
    train(tmp_path, resume=True)
    assert made[-1].get_scale() == 128.0, "doubled twice from where it was"


def test_select_best_without_anything_to_select_by(tmp_path):
    validation = Validation(*[0.5] * 4)
    validation.evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.clear())
    with pytest.raises(BadInput, match="gave no val_mean_dice to select by"):
        train(tmp_path, validation=validation, select="best")


def test_resume_without_a_checkpoint_starts_anew_and_without_resume_nothing_is_read(tmp_path):
    train(tmp_path, resume=True)
    assert deployed(tmp_path) == 4.0
    train(tmp_path, epochs=2)
    assert deployed(tmp_path) == 2.0


@pytest.mark.parametrize("kind", ["another network", "other names", "cut short", "something else"])
def test_a_checkpoint_that_is_not_of_this_run(tmp_path, kind):
    checkpoint = tmp_path / "output" / "checkpoint.pt"
    if kind == "another network":
        train(tmp_path, Counter(size=3))
    else:
        train(tmp_path)
        content = torch.load(checkpoint, weights_only=True)
        if kind == "cut short":
            checkpoint.write_bytes(checkpoint.read_bytes()[:500])
        elif kind == "other names":
            torch.save({**content, "state": {"generator": content["state"]["method"]}}, checkpoint)
        else:
            torch.save([1, 2, 3], checkpoint)
    (tmp_path / "models" / "model.pt").unlink()
    with pytest.raises(
        BadInput, match=r"(?s)checkpoint\.pt: can't resume from it .*another configuration.*--resume false"
    ):
        train(tmp_path, resume=True)
    assert not (tmp_path / "models" / "model.pt").exists()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    train(tmp_path)
    assert names(tmp_path) == []


def test_settings_that_contradict_one_another():
    with pytest.raises(BadInput, match="select: found 'first'"):
        Checkpoint({}, nn.Linear(1, 1), "output", "model.pt", select="first")
    with pytest.raises(BadInput, match="the evaluator is null"):
        Checkpoint({}, nn.Linear(1, 1), "output", "model.pt", select="best")
