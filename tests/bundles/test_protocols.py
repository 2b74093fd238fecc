"""The literature's protocol on the left atrium, as overlays over the teacher's and the student's training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import config, recipe_files
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import KeepLargestConnectedComponentd

import common.data
import common.engines
import common.networks
import common.transforms
from common.data import collate_plain
from common.engines import SemiSupervisedTrainer
from common.networks import save_weights
from common.networks.vnet import VNet
from common.recipes import Recipe, protocol_overlays, read_recipes

LEFT_ATRIUM = "protocols/left_atrium.json"
VIEWS = "protocols/left_atrium_views.json"
STRONG_VIEW = "protocols/left_atrium_strong_view.json"
SMALL = [2, 2, 2, 2, 2]


def parsed(bundle: str, *names: str) -> ConfigParser:
    parser = ConfigParser(globals={"common": "common", "torch": "torch", "monai": "monai"})
    parser.read_config([config(bundle, name) for name in names])
    parser["device"], parser["features"] = "cpu", SMALL
    if bundle == "student":
        parser["teacher"] = None
    return parser


@pytest.mark.parametrize("bundle", ["teacher", "student"])
def test_network_and_training_are_the_literatures(bundle: str) -> None:
    parser = parsed(bundle, "train.json", LEFT_ATRIUM)
    assert [parser[key] for key in ("patch_size", "spacing")] == [[112, 112, 80], [0.625] * 3]
    assert parser["batch_size"] == {"teacher": 4, "student": 2}[bundle]
    assert parser["iterations_per_epoch"] * parser["train#trainer#max_epochs"] == 6000
    assert parser["select"] == "last"
    network = parser.get_parsed_content("network_def")
    assert isinstance(network, VNet)
    assert network.segmentation_decoder.heads[-1].out_channels == 2
    assert all(size % by == 0 for size, by in zip(parser["patch_size"], network.divisor, strict=True))
    (group,) = parser.get_parsed_content("train#optimizer").param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    assert parser.get_parsed_content("gradient_clip") is None


@pytest.mark.parametrize("bundle", ["teacher", "student"])
def test_the_learning_rate_falls_every_2500_steps(bundle: str) -> None:
    parser = parsed(bundle, "train.json", LEFT_ATRIUM)
    optimizer, scheduler = (parser.get_parsed_content(f"train#{key}") for key in ("optimizer", "lr_scheduler"))
    handler = next(h for h in parser["train#handlers"] if h["_target_"] == "LrScheduleHandler")
    assert handler["epoch_level"] is False, "a step of the scheduler is a step of the training"
    rates = []
    for _ in range(6000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [rates[step] for step in (0, 2499, 2500, 4999, 5000, 5999)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    )


@pytest.mark.parametrize("bundle", ["teacher", "student"])
def test_evaluation_is_dense_with_constant_weights_and_one_component(bundle: str) -> None:
    parser = parsed(bundle, "train.json", "evaluate.json", LEFT_ATRIUM)
    parser["inferer#sw_batch_size"] = 1
    inferer = parser.get_parsed_content("validate#inferer")
    starts = set()

    def network(window: torch.Tensor) -> torch.Tensor:
        starts.add(tuple(int(x) for x in window[0, :, 0, 0, 0]))
        return window[:, :2]

    size = (130, 113, 87)
    image = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float32) for s in size], indexing="ij"))[None]
    inferer(image, network)
    assert starts == {(x, y, z) for x in (0, 18) for y in (0, 1) for z in (0, 4, 7)}
    assert (inferer.mode.value, inferer.average) == ("constant", "probabilities")
    steps = parser.get_parsed_content("validate#postprocessing").transforms
    assert any(isinstance(step, KeepLargestConnectedComponentd) for step in steps)
    without = parsed(bundle, "train.json", "evaluate.json").get_parsed_content("validate#postprocessing").transforms
    assert not any(isinstance(step, KeepLargestConnectedComponentd) for step in without)


@pytest.mark.parametrize(
    ("bundle", "overlays", "stream"),
    [
        ("teacher", [LEFT_ATRIUM], ""),
        ("student", [LEFT_ATRIUM, VIEWS], ""),
        ("student", [LEFT_ATRIUM, VIEWS], "unlabeled_"),
        ("student", [LEFT_ATRIUM, VIEWS, STRONG_VIEW], "unlabeled_"),
    ],
)
def test_crops_lie_anywhere_and_are_turned_and_mirrored_in_the_plane(
    bundle: str, overlays: list[str], stream: str
) -> None:
    parser = parsed(bundle, "train.json", *overlays)
    parser["patch_size"] = [2, 2, 2]
    views = common.transforms.chain(
        *(parser.get_parsed_content(f"train#{stream}{part}") for part in ("crop", "augmentation"))
    ).set_random_state(0)
    volume = torch.arange(36).reshape(1, 3, 3, 4)
    seen = []
    for _ in range(1000):
        case = {"image": MetaTensor(volume.float())}
        if not stream:
            case["label"] = MetaTensor(volume.to(torch.uint8))
        view = views(case)
        image = view["image"]
        assert (type(image), image.dtype) == (torch.Tensor, torch.float32)
        if not stream:
            assert view["label"].dtype == torch.int64
            assert torch.equal(view["label"], image.long())
        assert ("strong" in view) == (STRONG_VIEW in overlays)
        seen.append(tuple(int(x) for x in image.flatten()))
    # Positions of the crop, times the eight ways to lay a square down; never upside down along the third axis.
    assert len(set(seen)) == 2 * 2 * 3 * 8
    assert all(view[1] == view[0] + 1 for view in seen)
    upright = sum(abs(view[2] - view[0]) == 4 for view in seen) / len(seen)
    assert 0.45 < upright < 0.55, "all four turns are equally frequent"


@pytest.mark.parametrize("recipe", ["aggregating_decoupling", "bcp", "distillation", "supervised"])
def test_crops_lie_anywhere_with_equal_probability_for_all_rows(recipe: str) -> None:
    """Whatever the recipe's augmentation is, and wherever the structure lies: here in a corner."""
    found = read_recipes().get(recipe)
    if found is None:
        parser = parsed("teacher", "train.json", *protocol_overlays("left_atrium", "teacher"))
    else:
        parser = parsed("student", "train.json", *found.overlays, *protocol_overlays("left_atrium", "student", found))
    parser["patch_size"] = [2, 2, 2]
    crop = common.transforms.chain(parser.get_parsed_content("train#crop")).set_random_state(0)
    volume = torch.arange(36).reshape(1, 3, 3, 4)
    case = {"image": MetaTensor(volume.float()), "label": MetaTensor((volume == 0).to(torch.uint8))}
    draws = [int(crop(dict(case))["image"].min()) for _ in range(600)]
    counts = [draws.count(start) for start in set(draws)]
    assert len(counts) == 2 * 2 * 3
    assert max(counts) < 80, "of 50 each"


@pytest.mark.parametrize("bundle", ["teacher", "student"])
def test_the_supervised_loss_is_half_the_sum_of_cross_entropy_and_squared_dice(bundle: str) -> None:
    parser = parsed(bundle, "train.json", LEFT_ATRIUM)
    loss = parser.get_parsed_content("train#method#segmentation_loss")
    weight = parser["train#trainer#loss_weight"]
    torch.manual_seed(0)
    logits, label = torch.randn(2, 2, 4, 4, 4), torch.randint(2, (2, 1, 4, 4, 4))
    p, y = logits.softmax(1)[:, 1], label[:, 0].float()
    dice = 1 - (2 * (p * y).sum() + 1e-5) / (p.square().sum() + y.square().sum() + 1e-5)
    expected = 0.5 * (torch.nn.functional.cross_entropy(logits, label[:, 0]) + dice)
    torch.testing.assert_close(weight * loss([logits], label), expected)


@pytest.mark.parametrize("recipe", [r for r in read_recipes().values() if not r.is_ablation], ids=lambda r: r.name)
def test_what_makes_a_recipe_itself_outlives_the_protocol(recipe: Recipe) -> None:
    """It takes the optimiser's settings, the network's dropout, and views that are not what the recipe is about."""
    files = [config("student", name) for name in ("train.json", *recipe.overlays)]
    before, after = ConfigParser(), ConfigParser()
    before.read_config(files)
    after.read_config(files + [config("student", name) for name in protocol_overlays("left_atrium", "student", recipe)])
    replaced = {"learning_rate", "momentum", "weight_decay", "network_def#dropout", "network_def#_target_"}
    if recipe.name != "aggregating_decoupling":
        replaced.add("train#unlabeled_augmentation")
    for key in recipe.content or {}:
        if not key.startswith("_") and key not in replaced:
            kept = {**after[key]} if isinstance(after[key], dict) else after[key]
            if key == "train#method":
                kept.pop("segmentation_loss")
            if key == "train#method" and "discriminator" in kept:
                assert kept["discriminator"]["features"] == [64, 128, 256, 512], "as published"
                kept["discriminator"] = {**kept["discriminator"], "features": "$@features[1:]"}
            assert kept == before[key], key
    network = "dynamic_convolution.DyBACVNet" if recipe.name == "ase_net_dybac" else "vnet.VNet"
    assert after["network_def#_target_"] == f"common.networks.{network}"


def test_half_the_loss_but_for_those_that_halve_it_themselves_or_have_whole_sums() -> None:
    def weight(name: str) -> float:
        recipe = read_recipes()[name]
        parser = ConfigParser()
        overlays = (*recipe.overlays, *protocol_overlays("left_atrium", "student", recipe))
        parser.read_config([config("student", file) for file in ("train.json", *overlays)])
        return parser["train#trainer#loss_weight"]

    names = [recipe.name for recipe in read_recipes().values() if not recipe.is_ablation]
    whole = ("aggregating_decoupling", "ase_net", "ase_net_dybac")
    assert {name: weight(name) for name in names} == {name: 1.0 if name in whole else 0.5 for name in names}


class Run:
    """A recipe's training on the V-Net, with its dropout and batch norm, of two epochs of two steps."""

    def __init__(self, recipe: Recipe, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        overlays = (*recipe.overlays, *protocol_overlays("left_atrium", "student", recipe))
        parser = ConfigParser(globals={"common": "common", "torch": "torch", "monai": "monai"})
        parser.read_config([config("student", name) for name in ("train.json", *overlays)])
        parser.update({"device": "cpu", "features": SMALL, "patch_size": [32, 32, 32]})
        if parser["teacher_path"] is not None:
            parser["teacher_path"] = str(folder / "teacher.pt")
            if seed == 0:
                save_weights(parser.get_parsed_content("teacher_def"), folder / "teacher.pt")
        self.method = parser.get_parsed_content("train#method")
        found = parser.get_parsed_content("train#optimizer")
        self.optimizers = found if isinstance(found, dict) else {"": found}
        assert isinstance(parser.get_parsed_content("train#lr_scheduler"), torch.optim.lr_scheduler.StepLR)
        torch.manual_seed(0)
        crops = [torch.randn(1, 32, 32, 32) for _ in range(4)]
        streams = {
            "labeled": [{"image": MetaTensor(crop), "label": MetaTensor((crop > 0).byte())} for crop in crops[:2]],
            "unlabeled": [{"image": MetaTensor(crop)} for crop in crops[2:]],
        }
        views = {"labeled": "train#augmentation", "unlabeled": "train#unlabeled_augmentation"}
        chains = {stream: parser.get_parsed_content(view).set_random_state(0) for stream, view in views.items()}
        batch = {stream: collate_plain([chains[stream](case) for case in cases]) for stream, cases in streams.items()}
        self.trainer = SemiSupervisedTrainer("cpu", 2, [batch, batch], self.method, found, False, None)

    def state(self) -> dict[str, Any]:
        return {"method": self.method, **self.optimizers}

    def go_on_from(self, other: Run) -> None:
        for name, part in self.state().items():
            part.load_state_dict(copy.deepcopy(other.state()[name].state_dict()))
        self.trainer.state.epoch, self.trainer.state.iteration = (
            other.trainer.state.epoch,
            other.trainer.state.iteration,
        )


@pytest.mark.parametrize("recipe", [r for r in read_recipes().values() if not r.is_ablation], ids=lambda r: r.name)
def test_every_recipe_trains_the_v_net_and_resumes_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    whole, cut, resumed = (Run(recipe, tmp_path, seed) for seed in (0, 0, 5))
    before = {key: value.clone() for key, value in whole.method.deployed.state_dict().items()}
    whole.trainer.run()
    assert isinstance(whole.method.deployed, VNet)
    state = whole.method.deployed.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert any(not torch.equal(state[key], value) for key, value in before.items())

    cut.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), cut.trainer.terminate)
    cut.trainer.run()
    resumed.go_on_from(cut)
    resumed.trainer.run()
    assert repr(resumed.trainer.state.output) == repr(whole.trainer.state.output), "the same losses, NaN or not"
    expected = whole.method.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.method.state_dict().items())


def test_ase_net_has_its_rates_and_lets_that_of_the_network_fall_alone() -> None:
    """Discriminators: SGD at 0.01, held. Network: Adam at 0.001, a tenth of it after 2500 steps."""
    parser = ConfigParser(globals={"common": "common", "torch": "torch", "monai": "monai"})
    parser.read_config([config("student", "train.json"), *recipe_files("ase_net"), config("student", LEFT_ATRIUM)])
    parser.update({"device": "cpu", "features": SMALL})
    optimizers, scheduler = (parser.get_parsed_content(f"train#{key}") for key in ("optimizer", "lr_scheduler"))
    assert {name: type(o).__name__ for name, o in optimizers.items()} == {"discriminators": "SGD", "network": "Adam"}
    rates = []
    for _ in range(2501):
        rates.append([o.param_groups[0]["lr"] for o in optimizers.values()])
        for o in optimizers.values():
            o.step()
        scheduler.step()
    assert rates[2499] == pytest.approx([0.01, 0.001])
    assert rates[2500] == pytest.approx([0.01, 0.0001])


def test_it_trains_and_evaluates(workflow: Callable[..., None], phantoms: Path, tmp_path: Path) -> None:
    small = {
        "dataset_dir": str(phantoms),
        "labels": {"0": "background", "1": "lumen", "2": "wall"},
        "spacing": [1.0, 1.0, 1.0],
        "patch_size": [32, 32, 32],
        "features": SMALL,
        "inferer#stride": [16, 16, 16],
        "train#trainer#max_epochs": 1,
        "iterations_per_epoch": 1,
    }
    teacher = {"output_dir": str(tmp_path / "teacher"), "ckpt_dir": str(tmp_path / "teacher")}
    workflow("teacher", config("teacher", LEFT_ATRIUM), **small, **teacher)
    student = {"output_dir": str(tmp_path / "student"), "ckpt_dir": str(tmp_path / "student")}
    small["teacher_path"] = str(tmp_path / "teacher" / "model.pt")
    overlays = [config("student", name) for name in (LEFT_ATRIUM, VIEWS, STRONG_VIEW)]
    workflow("student", *overlays, **small, **student)
    workflow("student", *overlays, names=("train.json", "evaluate.json"), **small, **student)
    summary = json.loads((tmp_path / "student" / "summary.json").read_text())
    assert {"hd95", "hd95_pooled", "hd95_pooled_voxels", "asd_voxels"} <= set(summary["labels"]["wall"])


@pytest.mark.parametrize("bundle", ["teacher", "student"])
def test_inference_is_that_of_the_protocol(bundle: str) -> None:
    """Its overlay repeats what the training's says, which has keys that inference lacks."""
    overlay = "protocols/left_atrium_inference.json"
    trained, used = (json.loads(Path(config(bundle, name)).read_text()) for name in (LEFT_ATRIUM, overlay))
    del used["_comment"]
    assert used == {key: trained[key] for key in used}
    parser = parsed(bundle, "inference.json", overlay)
    network = parsed(bundle, "train.json", LEFT_ATRIUM).get_parsed_content("network_def")
    parser.get_parsed_content("network").load_state_dict(network.state_dict())
    inferer = parser.get_parsed_content("inferer")
    assert (inferer.window, inferer.average) == ((112, 112, 80), "probabilities")
    steps = [int(size * (1 - part)) for size, part in zip(inferer.window, inferer.overlap, strict=True)]
    assert steps == [18, 18, 4]


def test_inference_with_the_protocols_dynamic_convolutions() -> None:
    recipe = read_recipes()["ase_net_dybac"]
    trained = parsed("student", "train.json", *recipe.overlays, *protocol_overlays("left_atrium", "student", recipe))
    parser = parsed("student", "inference.json", "protocols/left_atrium_inference.json")
    parser["network_def#_target_"] = "common.networks.dynamic_convolution.DyBACVNet"  # as the bundle's README says
    parser.get_parsed_content("network").load_state_dict(trained.get_parsed_content("network_def").state_dict())
