from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.handlers import LrScheduleHandler
from monai.transforms import RandGaussianNoised
from torch import Tensor, nn

from common.data import StreamLoader, make_loader
from common.engines import SemiSupervisedTrainer
from common.errors import BadInput
from common.handlers import Checkpoint
from common.losses import FeatureAlignment, Threshold
from common.methods import Distillation, Method, Supervised
from common.networks import SegmentationNetwork


class Line(Method):
    """Learns ``weight * image = label`` by squared error; knows how often it was asked."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.asked: list[tuple[int, int]] = []

    def forward(self, batch: dict[str, dict[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        self.asked.append((self.step, self.total_steps))
        error = (self.weight * batch["labeled"]["image"] - batch["labeled"]["label"]).square().mean()
        return {"loss": error, "size": self.weight.abs()}


class Spoiled(Line):
    """Goes wrong at the third step, in its loss or in its gradient alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, batch: dict[str, dict[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        terms = super().forward(batch)
        if self.step == 2:
            wrong = {
                "loss": self.weight * math.nan,
                "infinite": self.weight * math.inf,
                "gradient": (0 * self.weight).abs().sqrt(),
            }
            terms["loss"] = terms["loss"] + wrong[self.how]
        return terms


class Rivals(Method):
    """Two numbers, each of which has an optimiser of its own, and reads the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(10.0))
        self.steps: list[str] = []

    def forward(self, batch: dict[str, dict[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        self.steps.append(optimizer)
        mine, other = (self.first, self.second) if optimizer == "first" else (self.second, self.first)
        return {"loss": (mine - other).square() / 2, "distance": (mine - other).abs()}

    def after_step(self) -> None:
        self.steps.append("after")


def steps(*pairs: tuple[float, float]) -> list[dict[str, dict[str, Tensor]]]:
    return [{"labeled": {"image": torch.tensor([image]), "label": torch.tensor([label])}} for image, label in pairs]


def train(
    method: Method, loader: Any, optimizer: Any = None, epochs: int = 1, **settings: Any
) -> SemiSupervisedTrainer:
    optimizer = optimizer or torch.optim.SGD(method.trainable_parameters(), lr=0.1)
    settings = {"amp": False, "gradient_clip": None, **settings}
    trainer = SemiSupervisedTrainer("cpu", epochs, loader, method, optimizer, **settings)
    trainer.run()
    return trainer


def network(seed: int = 0, dropout: float = 0.0) -> SegmentationNetwork:
    torch.manual_seed(seed)
    return SegmentationNetwork(2, 1, 3, [2, 4], [3, 3], [1, 2], 1, dropout)


def real_batch() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (2, 1, 16, 16), generator=generator)
    return {"labeled": {"image": torch.randn(2, 1, 16, 16, generator=generator), "label": label}}


def distillation(seed: int) -> Distillation:
    """Everything that a resumed run must find again: dropout, moving average, schedules, boxes."""
    return Distillation(
        network(seed, dropout=0.2),
        network(99),
        "abc",
        threshold=Threshold(0.3, 0.5, "linear"),
        alignment=FeatureAlignment([1]),
        mix_probability=0.7,
        labels_from="moving_average",
        warm_up=0.4,
    )


def streams(seed: int = 0) -> StreamLoader:
    """Random augmentation, and streams whose lengths differ from one another and from the epoch's."""
    generator = torch.Generator().manual_seed(5)
    image, weak = torch.randn(2, 5, 1, 16, 16, generator=generator)
    label = torch.randint(3, (5, 1, 16, 16), generator=generator)
    labeled = [{"image": image[i], "label": label[i]} for i in range(3)]
    unlabeled = [{"image": weak[i], "strong": weak[i]} for i in range(5)]
    return StreamLoader(
        {
            "labeled": make_loader(Dataset(labeled, RandGaussianNoised("image", prob=1.0, std=0.1)), 2, seed),
            "unlabeled": make_loader(Dataset(unlabeled, RandGaussianNoised("strong", prob=1.0, std=0.5)), 2, seed),
        },
        length=3,
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_is_that_of_the_plain_loop(clip):
    method = Supervised(network())
    plain = copy.deepcopy(method)
    train(
        method,
        [real_batch(), real_batch()],
        torch.optim.SGD(method.trainable_parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
        gradient_clip=clip,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        plain(real_batch())["loss"].backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)))
        optimizer.step()
    assert clip is None or max(norms) > clip, "otherwise nothing was clipped"
    assert same(method.state_dict(), plain.state_dict())


def test_gradients_are_clipped_a_2_norm():
    """The gradient is -2 * 3 * 4 = -24, the learning rate 1."""
    for clip, expected in ((None, 24.0), (100.0, 24.0), (12.0, 12.0), (0.5, 0.5)):
        method = Line()
        train(method, steps((3.0, 4.0)), torch.optim.SGD(method.parameters(), lr=1.0), gradient_clip=clip)
        assert method.weight.item() == pytest.approx(expected, rel=1e-5)


def test_method_knows_how_far_the_run_is():
    method = Line()
    train(method, steps((1.0, 1.0), (1.0, 1.0)), epochs=3)
    assert method.asked == [(step, 6) for step in range(6)]


def test_every_optimizer_steps_by_its_own_loss_in_turn():
    """Learning rates 0.5 and 0.1. first: 1 - 0.5 * (1 - 10) = 5.5; second, which sees that: 10 - 0.1 * (10 - 5.5)."""
    method = Rivals()
    optimizers = {
        "first": torch.optim.SGD([method.first], lr=0.5),
        "second": torch.optim.SGD([method.second], lr=0.1),
    }
    trainer = train(method, steps((0.0, 0.0)), optimizers)
    assert method.steps == ["first", "second", "after"]
    assert method.first.item() == pytest.approx(5.5)
    assert method.second.item() == pytest.approx(9.55)
    assert trainer.state.output["first/distance"] == pytest.approx(9.0)
    assert trainer.state.output["second/distance"] == pytest.approx(4.5)
    assert trainer.state.output["loss"] == pytest.approx(81 / 2 + 4.5**2 / 2), "what a bar and a curve show"
    assert trainer.state.metrics["train/first/loss"] == pytest.approx(81 / 2)
    rates = {key: value for key, value in trainer.state.metrics.items() if "rate" in key}
    assert rates == {"train/first/learning_rate": 0.5, "train/second/learning_rate": 0.1}


def test_a_loss_s_weight_is_that_of_its_gradients():
    """Half of them: 1 - 0.25 * (1 - 10) = 3.25. What is logged is the loss itself."""
    method = Rivals()
    optimizers = {name: torch.optim.SGD([getattr(method, name)], lr=0.5) for name in ("first", "second")}
    trainer = train(method, steps((0.0, 0.0)), optimizers, loss_weight=0.5)
    assert method.first.item() == pytest.approx(3.25)
    assert trainer.state.metrics["train/first/loss"] == pytest.approx(81 / 2)


def test_gradients_of_several_optimizers_are_clipped_each():
    method = Rivals()
    optimizers = {name: torch.optim.SGD([getattr(method, name)], lr=1.0) for name in ("first", "second")}
    train(method, steps((0.0, 0.0)), optimizers, gradient_clip=2.0)
    assert (method.first.item(), method.second.item()) == pytest.approx((3.0, 8.0))


def test_bf16_trains_float32_weights_on_a_cpu():
    seen = []
    method = Supervised(network())
    method.network.encoder.stages[0][0].conv.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    before = copy.deepcopy(method.state_dict())
    trainer = train(method, [real_batch()] * 3, amp="bf16")
    assert set(seen) == {torch.bfloat16}
    assert trainer.precision is torch.bfloat16
    assert not trainer.scaler.is_enabled()
    for value in method.state_dict().values():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    assert not same(before, method.state_dict())
    exact = Supervised(network())
    train(exact, [real_batch()] * 3, amp=False)
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(method.state_dict()[name], value, atol=0.02, rtol=0.05, msg=name)


@pytest.mark.parametrize(
    ("how", "what"),
    [("loss", "the loss is nan"), ("infinite", "the loss is"), ("gradient", "a gradient is not finite")],
)
def test_divergence_stops_the_run_before_it_reaches_the_weights(how, what):
    method, reference = Spoiled(how), Line()
    batches = steps(*[(1.0, 2.0)] * 4)
    with pytest.raises(BadInput, match=f"epoch 1, iteration 3: {what}.*learning_rate"):
        train(method, batches)
    train(reference, batches[:2])
    assert math.isfinite(method.weight.item())
    assert method.weight.item() == reference.weight.item(), "two good steps, and no third"


def test_errors_reach_the_caller_after_every_handler_heard_of_them():
    class Listener:
        heard: BaseException | None = None

        def attach(self, engine):
            engine.add_event_handler(Events.EXCEPTION_RAISED, self.hear)

        def hear(self, engine, error):
            self.heard = error

    listener = Listener()
    with pytest.raises(BadInput):
        train(Spoiled("loss"), steps(*[(1.0, 2.0)] * 4), train_handlers=[listener])
    assert isinstance(listener.heard, BadInput)


def test_means_of_an_epoch():
    """A term that is not a number at a step (no voxel of its class) leaves that step out of its mean."""

    class Told(Line):
        def forward(self, batch, optimizer=""):
            image = batch["labeled"]["image"].squeeze()
            return {"loss": self.weight * 0 + image, "kept/wall": image / image * 0.5, "never": image * math.nan}

    seen = []

    class Reader:
        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)))

    batches = [*steps((4.0, 0.0), (0.0, 0.0), (2.0, 0.0)), *steps((7.0, 0.0), (8.0, 0.0), (9.0, 0.0))]

    class Loader:
        epoch = 0

        def __len__(self):
            return 3

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            yield from batches[3 * (self.epoch - 1) : 3 * self.epoch]

    method = Told()
    train(method, Loader(), epochs=2, train_handlers=[Reader()])
    assert seen[0]["train/loss"] == pytest.approx(2.0)
    assert seen[1]["train/loss"] == pytest.approx(8.0), "of this epoch alone"
    assert seen[0]["train/kept/wall"] == pytest.approx(0.5)
    assert seen[0]["train/learning_rate"] == pytest.approx(0.1)
    assert "train/never" not in seen[0]


def test_what_is_not_a_tensor_passes_to_the_method_untouched():
    seen = []

    class Reader(Line):
        def forward(self, batch, optimizer=""):
            seen.append(batch["labeled"]["annotated"])
            return super().forward(batch)

    batches = steps((1.0, 1.0))
    batches[0]["labeled"]["annotated"] = [[1], None]
    train(Reader(), batches)
    assert seen == [[[1], None]]


def run(seed: int, loader_seed: int = 0) -> dict[str, Tensor]:
    method = distillation(0)
    train(method, streams(loader_seed), epochs=2, seed=seed)
    return method.state_dict()


def test_same_seed_same_weights():
    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert same(first, run(0)), "whatever the process drew before"
    assert not same(first, run(1)), "dropout and boxes follow the seed"
    assert not same(first, run(0, loader_seed=1)), "so does the augmentation"


class PowerCut(Exception):
    """Stands for anything that ends a process."""


@pytest.mark.parametrize("stop_at", [6, 8], ids=["after the second epoch", "within the third"])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, stop_at):
    def make(folder: str, init: int, resume: bool, stop: int | None = None) -> tuple[Distillation, Any, Any]:
        method = distillation(init)
        optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.05, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=12, power=0.9)
        state = {"method": method, "optimizer": optimizer, "lr_scheduler": schedule}
        handlers = [
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            Checkpoint(state, method.deployed, str(tmp_path / folder), str(tmp_path / folder / "model.pt"), resume),
        ]
        trainer = SemiSupervisedTrainer("cpu", 4, streams(), method, optimizer, False, train_handlers=handlers)
        if stop is not None:

            def cut(engine):
                if engine.state.iteration == stop + 1:
                    raise PowerCut

            trainer.add_event_handler(Events.ITERATION_STARTED, cut)
        return method, optimizer, trainer

    whole, whole_optimizer, trainer = make("whole", 0, False)
    trainer.run()
    with pytest.raises(PowerCut):
        make("cut", 0, False, stop_at)[2].run()
    assert not (tmp_path / "cut" / "model.pt").exists()
    torch.manual_seed(123)
    resumed, resumed_optimizer, trainer = make("cut", 7, True)
    trainer.run()
    assert trainer.state.iteration == 12
    assert same(whole.state_dict(), resumed.state_dict())
    for before, after in zip(
        whole_optimizer.state_dict()["state"].values(), resumed_optimizer.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(before["momentum_buffer"], after["momentum_buffer"])
    assert whole_optimizer.param_groups[0]["lr"] == resumed_optimizer.param_groups[0]["lr"]


def test_a_finished_run_that_is_resumed_does_not_train_again(tmp_path):
    def make(weight: float) -> tuple[Line, SemiSupervisedTrainer]:
        method = Line(weight)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
        state = {"method": method, "optimizer": optimizer}
        handler = Checkpoint(state, method, str(tmp_path), str(tmp_path / "model.pt"), resume=True)
        return method, SemiSupervisedTrainer(
            "cpu", 2, steps((1.0, 2.0)), method, optimizer, False, train_handlers=[handler]
        )

    first, trainer = make(0.0)
    trainer.run()
    again, trainer = make(5.0)
    trainer.run()
    assert not again.asked
    assert again.weight.item() == first.weight.item()


def test_a_term_that_has_ended_is_logged_no_more():
    class Ending(Line):
        def forward(self, batch: dict[str, dict[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
            terms = super().forward(batch)
            return terms if self.step < 2 else {"loss": terms["loss"], "size": terms["size"] * math.nan}

    metrics = train(Ending(), steps((1.0, 2.0), (1.0, 2.0)), epochs=2).state.metrics
    assert "train/loss" in metrics
    assert "train/size" not in metrics
