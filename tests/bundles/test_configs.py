"""The bundles' files: MONAI's own checks, the model zoo's names, and what must be the same everywhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bundle_runs import BUNDLES, ROOT, Chain, config
from monai.bundle import ConfigParser, ckpt_export, verify_metadata, verify_net_in_out

from common.packing.configs import merge_configs
from common.transforms import GeometricThicknessd

OVERRIDES = (
    *("dataset_dir", "datalist", "output_dir", "ckpt_dir", "device", "spacing", "patch_size", "batch_size"),
    *("iterations_per_epoch", "learning_rate", "val_interval", "amp", "seed", "num_workers", "tracking_uri"),
    "train#trainer#max_epochs",
)
CONVENTIONS = ("bundle_root", "train#trainer", "train#dataset#data", "train#handlers", "validate#evaluator", "run")
SCHEMA = ROOT / "common" / "packing" / "meta_schema_20240725.json"
PLANNED = ("labels", "channels", "spacing", "patch_size", "intensity", "features", "kernel_sizes", "strides")


def merged(bundle: str, *names: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([config(bundle, name) for name in names])
    return parser


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_follows_the_schema(bundle: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    shutil.copy(SCHEMA, schema)
    verify_metadata(meta_file=config(bundle, "metadata.json"), filepath=schema)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_network_is_as_the_metadata_says(bundle: str) -> None:
    files = {"meta_file": config(bundle, "metadata.json"), "config_file": config(bundle, "inference.json")}
    verify_net_in_out("network_def", **files, device="cpu")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_export_predicts_the_same(bundle: str, chain: Chain, tmp_path: Path) -> None:
    files = [config(bundle, "inference.json"), str(chain.plan)]
    script = tmp_path / "model.ts"
    ckpt_export(
        "network_def",
        filepath=script,
        ckpt_file=str(chain.model(bundle)),
        key_in_ckpt="model",
        meta_file=config(bundle, "metadata.json"),
        config_file=files,
    )
    parser = ConfigParser()
    parser.read_config(files)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(chain.model(bundle), weights_only=True)["model"])
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.allclose(torch.jit.load(script)(image), network(image), atol=1e-5)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_names_that_users_rely_on(bundle: str) -> None:
    train, inference = merged(bundle, "train.json"), merged(bundle, "inference.json")
    for key in (*OVERRIDES, *CONVENTIONS):
        assert key in train, key
    for key in ("bundle_root", "input", "output_dir", "device", "network_def", "preprocessing", "inferer"):
        assert key in inference, key
    assert ("teacher_path" in train, "student_path" in train) == (bundle == "student", bundle == "dual_decoder")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_one_network_one_preprocessing_one_inferer(bundle: str) -> None:
    train = merged(bundle, "train.json")
    evaluate = merged(bundle, "train.json", "evaluate.json")
    inference = merged(bundle, "inference.json")
    assert train["network_def"] == evaluate["network_def"] == inference["network_def"]
    assert train["validate#inferer"] == "@inferer"
    for settings in ("preprocessing", "inferer"):
        key = "image_preprocessing" if settings == "preprocessing" else settings
        found = [dict(train[settings]), dict(evaluate[key]), dict(inference[settings])]
        for arguments in found:
            arguments.pop("keys", None)  # labels and targets are only read where there are any
            arguments.pop("mirror_axes", None)  # an option, off unless asked for
            arguments.pop("measure", None)  # for inference's warnings
        assert found[0] == found[1] == found[2]
    post = [dict(evaluate["postprocessing"]), dict(inference["postprocessing"])]
    for arguments in post:
        for key in ("output_dir", "mask", "preprocessing", "segments", "warn"):
            arguments.pop(key, None)
    assert post[0] == post[1]
    for key in {*PLANNED, *re.findall(r"@(\w+)", json.dumps(train["network_def"]))}:
        assert train[key] == inference[key], key


def test_the_stages_fit_each_other() -> None:
    parsers = [merged(bundle, "train.json") for bundle in BUNDLES]
    for key in PLANNED:
        assert parsers[0][key] == parsers[1][key] == parsers[2][key], key


@pytest.mark.parametrize("bundle", BUNDLES)
def test_multi_gpu_does_what_training_does(bundle: str) -> None:
    train, overlay = merged(bundle, "train.json"), merged(bundle, "train.json", "multi_gpu_train.json")
    assert overlay["initialize"] == ["$common.engines.start_distributed()", *train["initialize"]]


@pytest.mark.parametrize("name", ["train.json", "inference.json"])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_plan_says_where_to_look_for_edges(bundle: str, name: str, plan: Path) -> None:
    """One plan goes with every bundle; only the dual decoder has a use for its ``edge_kernel``."""
    parser = ConfigParser()
    parser.read_config([config(bundle, name), str(plan)])
    parser["edge_kernel"] = [3, 3, 1]
    network = parser.get_parsed_content("network_def")
    assert getattr(network, "edge_kernel", None) == ([3, 3, 1] if bundle == "dual_decoder" else None)


@pytest.mark.parametrize("learn_weights", [False, True])
def test_learnt_weights_among_losses_do_not_decay(learn_weights: bool, plan: Path) -> None:
    parser = ConfigParser()
    parser.read_config([config("dual_decoder", "train.json"), str(plan)])
    parser["train#method#learn_weights"] = learn_weights
    groups = parser.get_parsed_content("train#optimizer").param_groups
    method, lock_in = parser.get_parsed_content("train#method"), parser.get_parsed_content("lock_in")
    free = [group["params"] for group in groups if group["weight_decay"] == 0]
    assert free == ([[method.weighting.log_variances]] if learn_weights else [])
    assert groups[0]["weight_decay"] == 3e-05
    held = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(p) for p in lock_in.trainable_parameters(method)}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bundles/dual_decoder/configs/ablations").glob("*.json")), ids=lambda p: p.stem
)
def test_ablations_make_a_network(path: Path, plan: Path) -> None:
    parser = ConfigParser()
    names = ["train.json", "evaluate.json"] if path.stem == "geometric" else ["train.json"]
    parser.read_config([*(config("dual_decoder", name) for name in names), str(plan), str(path)])
    network = parser.get_parsed_content("network_def")
    output = network.eval()(torch.zeros(1, 1, 16, 16, 16))
    expected = {"regression_only": 1, "geometric": 3}.get(path.stem, 4)
    assert output.shape == (1, expected, 16, 16, 16)
    classes = 0 if path.stem == "regression_only" else 3
    assert parser.get_parsed_content("inferer").classes == classes
    if path.stem != "geometric":  # which trains nothing
        assert parser.get_parsed_content("train#method#num_classes") == classes
        split = parser.get_parsed_content("validate#postprocessing")({"pred": output[0]})
        assert split["thickness_pred"].shape == (1, 16, 16, 16)


def test_a_packed_network_that_only_measures_predicts_without_classes(plan: Path, tmp_path: Path) -> None:
    configs = ROOT / "bundles/dual_decoder/configs"
    parser = ConfigParser(merge_configs(configs, [plan, configs / "ablations/regression_only.json"])["inference.json"])
    parser.update({"output_dir": str(tmp_path), "input": str(tmp_path), "entropy_from": None})
    split = parser.get_parsed_content("postprocessing").transforms[0]
    output = parser.get_parsed_content("network_def").eval()(torch.zeros(1, 1, 16, 16, 16))
    assert set(split({"pred": output[0]})) >= {"thickness_pred"}
    assert parser.get_parsed_content("inferer").classes == 0


def test_geometric_row_measures_the_target_that_has_a_cavity(plan: Path) -> None:
    """Whatever else is regressed, and in what order: the student's network has a channel for none of it."""
    volume = {"name": "volume", "unit": "mL", "kind": "sum"}
    other = {"name": "density", "unit": "HU", "kind": "dense", "structure": 1}
    wall = {"name": "wall_thickness", "unit": "mm", "kind": "dense", "structure": [2], "inner": [1]}
    wall.update(slicewise=True, axis=0, smallest_cavity=20)
    parser = ConfigParser()
    configs = ROOT / "bundles/dual_decoder/configs"
    files = [configs / "train.json", configs / "evaluate.json", plan, configs / "ablations/geometric.json"]
    parser.read_config([str(path) for path in files])
    parser["targets"] = [volume, other, wall]
    steps = parser.get_parsed_content("postprocessing").transforms
    (measure,) = (step for step in steps if isinstance(step, GeometricThicknessd))
    assert (measure.target, measure.structure, measure.inner) == ("wall_thickness", 2, [1])
    assert (measure.slicewise, measure.axis, measure.smallest_cavity) == (True, 0, 20)
    assert (steps[0].num_classes, steps[0].targets) == (3, [])
    for index in (0, 1):
        assert parser.get_parsed_content(f"validate#handlers#{index}#targets") == [wall]


def components(content: object) -> Iterator[dict[str, object]]:
    """Every component of a config, however deep."""
    if isinstance(content, dict):
        if "_target_" in content:
            yield content
        content = list(content.values())
    for item in content if isinstance(content, list) else []:
        yield from components(item)


def test_whatever_rotates_knows_the_voxel_size() -> None:
    """So that it rotates in mm, which targets that are lengths need."""
    rotating = ("supervised_augmentation", "weak_and_strong", "sampled_augmentation")
    rotates = 0
    for path in sorted((ROOT / "bundles").glob("*/configs/**/*.json")):
        for component in components(json.loads(path.read_text())):
            if str(component["_target_"]).endswith(rotating) and component.get("rotation") != 0:
                assert component.get("spacing") == "@spacing", path
                rotates += 1
    assert rotates >= 11


def test_studies_are_json_and_name_what_exists() -> None:
    from common.study import Study, read_study

    for path in sorted((ROOT / "studies").glob("*.json")):
        study = Study(read_study(path), Path("data"), Path("output"))
        for run in study.runs.values():
            for overlay in run.overlays:
                assert (ROOT / "bundles" / run.bundle / "configs" / overlay).is_file(), f"{path.name}: {overlay}"


def test_metadata_names_the_channels() -> None:
    for bundle in BUNDLES:
        metadata = json.loads(Path(config(bundle, "metadata.json")).read_text())
        formats = metadata["network_data_format"]
        assert next(iter(formats["inputs"])) == "image"
        assert next(iter(formats["outputs"])) == "pred"
        channels = formats["outputs"]["pred"]["channel_def"]
        labels = merged(bundle, "train.json")["labels"]
        targets = merged(bundle, "train.json").get("targets", [])
        measured = {str(len(labels) + i): f"{t['name']} ({t['unit']})" for i, t in enumerate(targets)}
        assert channels == {**labels, **measured}
        assert formats["outputs"]["pred"]["num_channels"] == len(channels)
