from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import PLAN, ROOT, config
from monai.bundle import ConfigParser
from monai.handlers import LrScheduleHandler
from torch import Tensor, nn

from common.data import generate_phantoms
from common.engines import SemiSupervisedTrainer
from common.errors import BadInput
from common.handlers import Checkpoint
from common.losses import SegmentationLoss, ema_decay
from common.methods import ase_net
from common.methods.ase_net import ASENet, add_noise, three_way_consistency
from common.networks import SegmentationNetwork
from common.networks.discriminator import Discriminator
from common.networks.dynamic_convolution import DyBAC, DyBACNetwork
from common.networks.vnet import VNet

TURNS = ("discriminators", "network")


class Pointwise(nn.Module):
    """Two classes; the logit of class 1 is ``slope * voxel``, that of class 0 is 0."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image), self.slope * image], dim=1)

    def forward_all(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [image], [self(image)]


class Judge(nn.Module):
    """The logit of "real" is ``a * (mean probability of class 1) + b * (mean of the image)``, that of "fake" is 0."""

    def __init__(self, a: float = 1.0, b: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        self.seen.append((probabilities, image))
        real = self.a * probabilities[:, 1].flatten(1).mean(1) + self.b * image.flatten(1).mean(1)
        return torch.stack([torch.zeros_like(real), real], 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def voxels(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def small(seed: int = 0, kind: type[SegmentationNetwork] = SegmentationNetwork, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return kind(2, 1, 3, [2, 4], [3, 3], [1, 2], 1, dropout)


def make(seed: int = 0, kind: type[SegmentationNetwork] = SegmentationNetwork, **settings: Any) -> ASENet:
    judge = partial(Discriminator, 2, 3, 1, [4, 4], [3, 3], [2, 2], dynamic=kind is DyBACNetwork)
    return ASENet(small(seed, kind, dropout=0.2), judge, **settings)


def optimizers(method: ASENet) -> dict[str, torch.optim.Optimizer]:
    return {
        "discriminators": torch.optim.SGD(method.discriminators.parameters(), 0.01, momentum=0.9, weight_decay=1e-4),
        "network": torch.optim.Adam(method.network.parameters(), 1e-3),
    }


def real_batch(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    image, unlabeled = torch.randn(2, 2, 1, 8, 8, generator=generator)
    label = torch.randint(3, (2, 1, 8, 8), generator=generator)
    return {"labeled": {"image": image, "label": label}, "unlabeled": {"image": unlabeled}}


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_noise_is_small_and_clipped():
    torch.manual_seed(0)
    noise = add_noise(torch.full((100_000,), 3.0)) - 3.0
    assert noise.abs().max().item() == pytest.approx(0.2, abs=1e-5)
    assert (noise.abs() > 0.1999).float().mean().item() == pytest.approx(0.0455, abs=0.003), "beyond two deviations"
    assert noise.mean().item() == pytest.approx(0.0, abs=2e-3)


def test_consistency_by_hand():
    """Class 1 at two voxels: clean 0.2 and 0.5, noisy 0.6 and 0.5, teacher 0.9 and 0.5. Squares 0.16, 0.49, 0.09."""
    maps = [torch.stack([1 - p, p]).unsqueeze(0) for p in torch.tensor([[0.2, 0.5], [0.6, 0.5], [0.9, 0.5]])]
    assert three_way_consistency(*maps).item() == pytest.approx((0.16 + 0.49 + 0.09) / 3 / 2)
    assert three_way_consistency(maps[0], maps[0], maps[0]).item() == 0.0


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> ASENet:
    """Noise adds 1. Student's slope 1, teacher's 2; D1 reads the map (slope 3), D2 map and image (slopes -2 and 1)."""
    monkeypatch.setattr(ase_net, "add_noise", lambda image: image + 1)
    judges = iter([Judge(3.0), Judge(-2.0, 1.0)])
    method = ASENet(Pointwise(1.0), lambda: next(judges), consistency_weight=2.0, ramp_up=0.5)
    with torch.no_grad():
        method.average.module.slope.fill_(2.0)
    return method.train()


BATCH = {
    "labeled": {"image": voxels(3.0, 1.0), "label": voxels(1, 0).long()},
    "unlabeled": {"image": voxels(0.5, -1.0)},
}


def test_losses_of_the_discriminators_by_hand(by_hand):
    terms = by_hand(BATCH, "discriminators")
    labeled = (sigmoid(3.0) + sigmoid(1.0)) / 2
    clean = (sigmoid(0.5) + sigmoid(-1.0)) / 2
    first = (math.log1p(math.exp(-3 * labeled)) + math.log1p(math.exp(3 * clean))) / 2
    assert terms["labeled"].item() == pytest.approx(first, rel=1e-5)
    # The teacher reads the clean voxels, the student the noisy ones; D2 sees both maps with the clean image, mean -1/4.
    teacher = -2 * (sigmoid(1.0) + sigmoid(-2.0)) / 2 - 0.25
    noisy = -2 * (sigmoid(1.5) + sigmoid(0.0)) / 2 - 0.25
    second = (math.log1p(math.exp(-teacher)) + math.log1p(math.exp(noisy))) / 2
    assert terms["teacher"].item() == pytest.approx(second, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(first + second, rel=1e-5)


@pytest.mark.parametrize(("step", "time"), [(0, 0.0), (2, 0.4), (5, 1.0), (9, 1.0)])
def test_loss_of_the_network_by_hand(by_hand, step, time):
    by_hand.progress(step, 10)
    terms = by_hand(BATCH, "network")
    supervised = SegmentationLoss()(by_hand.network(BATCH["labeled"]["image"]), BATCH["labeled"]["label"]).item() / 2
    cross_entropy = (math.log1p(math.exp(-3.0)) + math.log1p(math.exp(1.0))) / 2
    hit, missed = sigmoid(3.0), sigmoid(1.0)
    dice = 1 - 2 * hit / (hit + missed + 1)
    assert terms["segmentation"].item() == pytest.approx(supervised) == pytest.approx((cross_entropy + dice) / 2, 1e-4)

    clean, noisy, teacher = ([sigmoid(a), sigmoid(b)] for a, b in ((0.5, -1.0), (1.5, 0.0), (3.0, 0.0)))
    pairs = ((clean, noisy), (clean, teacher), (noisy, teacher))
    consistency = sum((p - q) ** 2 for one, other in pairs for p, q in zip(one, other, strict=True)) / 2 / 3
    assert terms["consistency"].item() == pytest.approx(consistency, rel=1e-5)

    first = math.log1p(math.exp(-3 * sum(clean) / 2))
    second = math.log1p(math.exp(-(-2 * sum(noisy) / 2 - 0.25)))
    assert terms["adversarial"].item() == pytest.approx((first + second) / 2, rel=1e-5)

    weight = 2 * math.exp(-5 * (1 - time) ** 2)
    expected = supervised + weight * (consistency + (first + second) / 2)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_who_judges_what(by_hand):
    """Every map comes with the clean image that it is of."""
    for turn in TURNS:
        by_hand(BATCH, turn)
    unlabeled = BATCH["unlabeled"]["image"]
    first = [image for _, image in by_hand.discriminators["labeled"].seen]
    second = [image for _, image in by_hand.discriminators["teacher"].seen]
    for found, expected in zip(first, [BATCH["labeled"]["image"], unlabeled, unlabeled], strict=True):
        assert torch.equal(found, expected)
    assert len(second) == 3
    assert all(torch.equal(image, unlabeled) for image in second)


def test_gradients_reach_the_student_through_both_judgements():
    """D2's is that of the noisy prediction. Each alone moves the student, and none the discriminators."""
    method = make().train()
    for fooled in ("labeled", "teacher"):
        method.zero_grad()
        for name, judge in method.discriminators.items():
            nn.init.constant_(judge.verdict.weight, 0.0)
            if name == fooled:
                nn.init.normal_(judge.verdict.weight)
        torch.manual_seed(0)
        method(real_batch(), "network")["adversarial"].backward()
        assert method.network.encoder.stages[0][0].conv.weight.grad.abs().max() > 0, fooled
        assert all(parameter.grad is None for parameter in method.discriminators.parameters())


def test_d2_s_gradient_by_hand(by_hand):
    """The adversarial term's derivative by the student's slope, with the noisy voxels 1.5 and 0 in D2's part."""

    def adversarial(slope: float) -> float:
        clean = (sigmoid(0.5 * slope) + sigmoid(-slope)) / 2
        noisy = (sigmoid(1.5 * slope) + sigmoid(0.0)) / 2
        return (math.log1p(math.exp(-3 * clean)) + math.log1p(math.exp(2 * noisy + 0.25))) / 2

    by_hand(BATCH, "network")["adversarial"].backward()
    expected = (adversarial(1 + 1e-4) - adversarial(1 - 1e-4)) / 2e-4
    assert by_hand.network.slope.grad.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [SegmentationNetwork, DyBACNetwork])
def test_each_turn_gives_gradients_to_its_own_part_alone(kind):
    method = make(kind=kind).train()
    for turn in TURNS:
        method.zero_grad()
        method(real_batch(), turn)["loss"].backward()
        held = {name.split(".")[0] for name, parameter in method.named_parameters() if parameter.grad is not None}
        assert held == {turn}
        assert all(parameter.grad is not None for parameter in getattr(method, turn).parameters())
        assert len(method.trainable_parameters()) == sum(
            len(list(getattr(method, name).parameters())) for name in TURNS
        )


def test_discriminators_are_in_evaluation_mode_while_they_are_fixed_and_the_student_never():
    method = make().train()
    seen: dict[str, list[bool]] = {}
    method.discriminators.eval()
    for name, module in {"network": method.network.encoder, "discriminators": method.discriminators["teacher"]}.items():
        module.register_forward_hook(lambda module, *_, name=name: seen.setdefault(name, []).append(module.training))
    for turn in TURNS:
        method(real_batch(), turn)
    assert seen == {"network": [True, True], "discriminators": [True, True, False]}
    method.eval()
    seen.clear()
    for turn in TURNS:
        method(real_batch(), turn)
    assert set(seen["network"] + seen["discriminators"]) == {False}


def test_running_statistics_of_the_student_move_in_its_own_turn_alone():
    torch.manual_seed(0)
    network = VNet(2, 1, 3, features=[2, 4], convolutions=[1, 1])
    method = ASENet(network, partial(Discriminator, 2, 3, 1, [4, 4], [3, 3], [2, 2])).train()
    moving = {}
    for turn in TURNS:
        before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
        method(real_batch(), turn)
        state = network.state_dict()
        moving[turn] = {not torch.equal(state[key], value) for key, value in before.items()}
    assert moving == {"discriminators": {False}, "network": {True}}


@pytest.mark.parametrize("kind", [SegmentationNetwork, DyBACNetwork])
def test_in_a_training_who_changes_when(kind):
    method = make(kind=kind, decay=0.5)
    both, seen = optimizers(method), [("start", state(method))]
    for name, optimizer in both.items():
        optimizer.register_step_post_hook(lambda *_, name=name: seen.append((name, state(method))))
    trainer = SemiSupervisedTrainer("cpu", 1, [real_batch(seed) for seed in range(3)], method, both, amp=False)
    trainer.run()
    seen.append(("end", state(method)))
    assert [name for name, _ in seen] == ["start", *TURNS * 3, "end"]
    for (last, before), (name, after) in pairwise(seen):
        # The temperature moves at the beginning of a step, the average at its end.
        names = [key for key in before if not key.endswith("temperature")]
        changed = {key.split(".")[0] for key in names if not torch.equal(before[key], after[key])}
        expected = {"discriminators": {"discriminators"}, "network": {"network"}, "end": set()}[name]
        assert changed == expected | ({"average"} if last == "network" else set()), f"{last} to {name}"
    for name, value in trainer.state.output.items():
        assert math.isfinite(value), name
    assert {"loss", "discriminators/loss", "discriminators/labeled", "discriminators/teacher"} < set(
        trainer.state.output
    )
    assert {"network/segmentation", "network/consistency", "network/adversarial"} < set(trainer.state.output)


def test_discriminators_learn_and_the_student_fools_them():
    """Trained on their own, the discriminators' loss falls; then the student alone raises it."""
    method = make().train()
    for module in method.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    batch = real_batch()
    both = {name: torch.optim.Adam(getattr(method, name).parameters(), 0.01) for name in TURNS}

    def train(name: str, term: str, steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            torch.manual_seed(step)
            both[name].zero_grad()
            terms = method(batch, name)
            terms[term].backward()
            both[name].step()
            losses.append(terms[term].item())
        return losses

    judged = train("discriminators", "loss", 40)
    assert judged[-1] < judged[0] - 0.1
    fooled = train("network", "adversarial", 40)
    assert fooled[-1] < fooled[0] - 0.1
    assert method(batch, "discriminators")["loss"].item() > judged[-1] + 0.1


def test_teacher_is_the_moving_average_and_has_no_gradient():
    student = Pointwise(0.0)
    method = ASENet(student, Judge, decay=0.9)
    expected = 0.0
    for update in range(15):
        with torch.no_grad():
            student.slope.fill_(float(update + 1))
        method.after_step()
        decay = ema_decay(update, 0.9)
        expected = decay * expected + (1 - decay) * (update + 1)
    assert method.average.module.slope.item() == pytest.approx(expected, rel=1e-5)
    method(BATCH, "network")["loss"].backward()
    assert method.average.module.slope.grad is None


@pytest.mark.parametrize("deploy", ["network", "moving_average"])
def test_discriminators_are_not_deployed(deploy):
    method = make(deploy=deploy)
    assert method.deployed is (method.network if deploy == "network" else method.average.module)
    assert sorted(method.deployed.state_dict()) == sorted(small().state_dict()), "names as in the network"
    kept = {name.split(".")[0] for name in method.state_dict()}
    assert kept == {"network", "average", "discriminators"}, "but they are in the checkpoint"


def test_the_two_discriminators_differ():
    first, second = (make().discriminators[name] for name in ("labeled", "teacher"))
    assert not torch.equal(first.map_stem.weight, second.map_stem.weight)


def test_temperature_falls_over_the_first_part_of_the_run_in_every_network():
    method = make(kind=DyBACNetwork, annealing=0.2)
    blocks = [module for module in method.modules() if isinstance(module, DyBAC)]
    assert len(blocks) == 2 * 2 + 2 * 1, "student and teacher, and a block of each discriminator"
    for step, expected in ((0, 34.0), (1, 17.5), (2, 1.0), (9, 1.0)):
        method.progress(step, 10)
        assert {block.temperature.item() for block in blocks} == {expected}
        method.after_step()
        assert {block.temperature.item() for block in blocks} == {expected}, "the average of equals"
    method = make(kind=DyBACNetwork, annealing=0.0)
    method.progress(0, 10)
    assert method.network.encoder.stages[1][0].conv.temperature.item() == 1.0


@pytest.mark.parametrize(
    ("settings", "message"), [({"deploy": "teacher"}, "deploy: found 'teacher'"), ({"annealing": -1}, "annealing")]
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(BadInput, match=message):
        make(**settings)


def test_a_single_optimizer_is_an_error_that_says_what_is_needed():
    with pytest.raises(BadInput, match="'discriminators' first and then 'network'"):
        make()(real_batch())


@pytest.mark.parametrize("kind", [SegmentationNetwork, DyBACNetwork])
def test_bf16(kind):
    method = make(kind=kind)
    trainer = SemiSupervisedTrainer("cpu", 1, [real_batch()] * 2, method, optimizers(method), amp="bf16")
    trainer.run()
    assert all(value.dtype in (torch.float32, torch.int64) for value in method.state_dict().values())
    exact = make(kind=kind)
    for turn in TURNS:
        terms = []
        for enabled in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                terms.append(exact(real_batch(), turn))
        for name, value in terms[0].items():
            assert terms[1][name].dtype == torch.float32
            torch.testing.assert_close(terms[1][name], value, atol=0.05, rtol=0.05, msg=name)


class PowerCut(Exception):
    """Stands for anything that ends a process."""


@pytest.mark.parametrize("kind", [SegmentationNetwork, DyBACNetwork])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(kind, tmp_path):
    def run(folder: str, seed: int, resume: bool = False, stop: bool = False) -> tuple[ASENet, list[float]]:
        method = make(seed, kind, annealing=0.9)
        both = optimizers(method)
        schedule = torch.optim.lr_scheduler.PolynomialLR(both["network"], total_iters=6, power=0.9)
        kept = {"method": method, **both, "lr_scheduler": schedule}
        handlers = [
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            Checkpoint(kept, method.deployed, str(tmp_path / folder), str(tmp_path / folder / "model.pt"), resume),
        ]
        batches = [real_batch(seed) for seed in range(2)]
        trainer = SemiSupervisedTrainer("cpu", 3, batches, method, both, False, train_handlers=handlers)
        losses = []

        def note(engine: Any) -> None:
            losses.append(engine.state.output["loss"])
            if stop and engine.state.iteration == 5:
                raise PowerCut

        trainer.add_event_handler("ITERATION_COMPLETED", note)
        if stop:
            with pytest.raises(PowerCut):
                trainer.run()
        else:
            trainer.run()
        return method, losses

    whole, losses = run("whole", 0)
    run("cut", 0, stop=True)
    resumed, later = run("cut", 7, resume=True)
    assert later == losses[4:]
    assert same(resumed.state_dict(), whole.state_dict())
    written = torch.load(tmp_path / "cut" / "model.pt", weights_only=True)["model"]
    assert not [name for name in written if "discriminator" in name]


TWO_PROCESSES = """
import torch
import torch.distributed as dist
from functools import partial
from common.engines import SemiSupervisedTrainer, start_distributed, stop_distributed
from common.methods.ase_net import ASENet
from common.networks.discriminator import Discriminator
from common.networks.dynamic_convolution import DyBACNetwork

start_distributed()
rank = dist.get_rank()
torch.manual_seed(0)
judge = partial(Discriminator, 2, 3, 1, [4, 4], [3, 3], [2, 2], dynamic=True)
method = ASENet(DyBACNetwork(2, 1, 3, [2, 4], [3, 3], [1, 2], 1), judge)
start = {name: value.clone() for name, value in method.named_parameters()}
torch.manual_seed(rank)
image, unlabeled = torch.randn(2, 2, 1, 8, 8)
label = torch.randint(3, (2, 1, 8, 8))
batch = {"labeled": {"image": image, "label": label}, "unlabeled": {"image": unlabeled}}
optimizers = {
    "discriminators": torch.optim.SGD(method.discriminators.parameters(), 0.01, momentum=0.9),
    "network": torch.optim.Adam(method.network.parameters(), 1e-3),
}
trainer = SemiSupervisedTrainer("cpu", 2, [batch, batch], method, optimizers, amp=False)
trainer.run()
moved = [not torch.equal(value, start[name]) for name, value in method.named_parameters() if "average" not in name]
torch.save({"state": method.state_dict(), "moved": moved, "loss": trainer.state.output["loss"]}, f"{rank}.pt")
stop_distributed()
"""


def test_two_processes_train_one_network(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first["state"], second["state"])
    assert first["loss"] != second["loss"], "each has its own data"
    assert sum(first["moved"]) > 0.9 * len(first["moved"]), "all parts train"


def recipe(folder: Path, *names: str, **settings: Any) -> ConfigParser:
    plan = folder / "plan.json"
    plan.write_text(json.dumps({**PLAN, "device": "cpu", "amp": False, **settings}))
    parser = ConfigParser()
    files = [config("student", "train.json"), str(plan), *(config("student", f"recipes/{name}.json") for name in names)]
    parser.read_config(files)
    return parser


@pytest.mark.parametrize(
    ("names", "network", "dynamic"),
    [
        (("ase_net",), SegmentationNetwork, False),
        (("ase_net", "ase_net_dybac"), DyBACNetwork, True),
    ],
    ids=["plain", "dybac"],
)
def test_recipe_trains(names, network, dynamic, tmp_path):
    """The overlays on the bundle's own config, from the datalist to the weights."""
    data = tmp_path / "data"
    generate_phantoms(data, labeled=2, unlabeled=2, validation=1, shape=(24, 24, 20), seed=1, progress=False)
    folders = {"dataset_dir": str(data), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "models")}
    parser = recipe(tmp_path, *names, **folders, iterations_per_epoch=2, val_interval=1)
    parser["train#trainer#max_epochs"] = 1
    # Without MLflow, whose database takes longer than all the rest.
    parser["train#handlers"] = [item for item in parser["train#handlers"] if "Tracking" not in item["_target_"]]
    method = parser.get_parsed_content("train#method")
    assert isinstance(method, ASENet)
    assert type(method.network) is type(method.deployed) is network
    assert (method.consistency_weight, method.ramp_up) == (1.0, 1.0)
    for judge in method.discriminators.values():
        assert [isinstance(block.conv, DyBAC) for block in judge.blocks] == [dynamic] * 2

    both = parser.get_parsed_content("train#optimizer")
    assert list(both) == list(TURNS), "the discriminators first"
    judging, segmenting = both["discriminators"], both["network"]
    group = judging.param_groups[0]
    assert isinstance(judging, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 1e-4)
    assert isinstance(segmenting, torch.optim.Adam)
    assert segmenting.param_groups[0]["lr"] == 1e-3
    for name, optimizer in both.items():
        held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
        assert held == {id(parameter) for parameter in getattr(method, name).parameters()}
    checkpoint = next(item for item in parser.get_parsed_content("train#handlers") if isinstance(item, Checkpoint))
    kept = checkpoint.trainer_state
    assert kept["method"] is method
    assert kept["discriminators"] is judging
    assert kept["optimizer"] is segmenting
    assert kept["lr_scheduler"] is parser.get_parsed_content("train#lr_scheduler")
    assert kept["lr_scheduler"].optimizer is segmenting

    assert parser.get_parsed_content("initialize#2") is False, "no teacher to start from"
    parser.get_parsed_content("train#trainer").run()
    written = torch.load(tmp_path / "models" / "model.pt", weights_only=True)["model"]
    assert same(written, method.deployed.state_dict())


def test_labelled_and_unlabelled_crops_are_cut_from_the_same_places(tmp_path):
    """Or the first discriminator could tell them apart without looking at the prediction."""
    parser = recipe(tmp_path, "ase_net")
    size = parser["patch_size"]
    grid = torch.stack(torch.meshgrid(*(torch.arange(2 * side) for side in size), indexing="ij")).float()
    label = torch.zeros(1, *grid.shape[1:])
    label[..., -2:, -2:] = 1  # in a corner, where crops round a structure would lie
    shares = []
    for name in ("crop", "unlabeled_crop"):
        place = parser.get_parsed_content(f"train#{name}").set_random_state(0)
        starts = []
        for _ in range(200):
            cropped = place({"image": grid.clone(), "label": label.clone()})
            starts.append((cropped[0] if isinstance(cropped, list) else cropped)["image"].flatten(1)[:, 0])
        shares.append((torch.stack(starts) / torch.tensor(size)).mean(0))
    torch.testing.assert_close(shares[0], shares[1], atol=0.1, rtol=0)
    assert (shares[0] < 0.6).all(), "in the mean half way"


def test_weights_of_the_dybac_recipe_fit_inference_with_its_network(tmp_path):
    parser = ConfigParser()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    parser.read_config([config("student", "inference.json"), str(plan)])
    parser["network_def#_target_"] = json.loads(Path(config("student", "recipes/ase_net_dybac.json")).read_text())[
        "network_def#_target_"
    ]
    network = recipe(tmp_path, "ase_net", "ase_net_dybac").get_parsed_content("train#method").deployed
    parser.get_parsed_content("network").load_state_dict(network.state_dict())


@pytest.mark.parametrize("names", [("ase_net",), ("ase_net", "ase_net_dybac")])
def test_every_key_of_the_overlays_is_one_of_the_config(names):
    """A key that the config lacks would be set without effect."""
    parser = ConfigParser()
    parser.read_config(config("student", "train.json"))
    for name in names:
        overlay = json.loads(Path(config("student", f"recipes/{name}.json")).read_text())
        for key, value in overlay.items():
            assert key.startswith("_") or key in parser, key
            parser[key] = value
