"""What a user gets wrong: a message that names the file or the key, before training, and no weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import PLAN, Chain, config, run
from monai.bundle import ConfigParser

from common.errors import find_bad_input
from common.networks import SegmentationNetwork, save_weights


@pytest.fixture
def data(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may spoil."""
    return Path(shutil.copytree(phantoms, tmp_path / "data"))


def edit_datalist(data: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = data / "datalist.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first(data: Path, key: str, section: str = "training") -> Path:
    return data / json.loads((data / "datalist.json").read_text())[section][0][key]


def cut(path: Path) -> None:
    """Leave the header and the first voxels, as a copy that was stopped does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    volume = nibabel.load(path)
    array = change(np.asarray(volume.dataobj))
    nibabel.save(nibabel.Nifti1Image(array, volume.affine if affine is None else affine), path)


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array[0, 0, 0] = np.nan
    return array


SPOILED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no datalist": (lambda data: (data / "datalist.json").unlink(), ["datalist.json"]),
    "not JSON": (lambda data: (data / "datalist.json").write_text("{"), ["datalist.json", "line 1"]),
    "no image file": (lambda data: first(data, "image").unlink(), ["phantom_training_000.nii.gz"]),
    "truncated image": (
        lambda data: first(data, "image").write_bytes(first(data, "image").read_bytes()[:2000]),
        ["phantom_training_000.nii.gz"],
    ),
    "another grid": (
        lambda data: rewrite(first(data, "label"), lambda array: array[:-2]),
        ["phantom_training_000.nii.gz", "grid"],
    ),
    "unknown label": (
        lambda data: rewrite(first(data, "label"), lambda array: np.where(array == 2, 7, array).astype(np.uint8)),
        ["phantom_training_000.nii.gz", "7", "labels"],
    ),
    "NaN voxels": (lambda data: rewrite(first(data, "image"), with_nan), ["phantom_training_000.nii.gz", "NaN"]),
    "two channels": (
        lambda data: rewrite(first(data, "image"), lambda array: np.stack([array, array], axis=-1)),
        ["phantom_training_000", "2 channel(s)"],
    ),
    "other classes": (
        lambda data: edit_datalist(data, lambda content: content["labels"].update({"2": "liver"})),
        ["labels", "liver"],
    ),
    "nothing labelled": (
        lambda data: edit_datalist(data, lambda content: content.update(training=[])),
        ["datalist.json", "training"],
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_data_that_cannot_be_trained_on(name: str, data: Path, workflow: Callable[..., None], tmp_path: Path) -> None:
    spoil, words = SPOILED[name]
    spoil(data)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (MONAI wraps it; the message is looked at)
        workflow("teacher", dataset_dir=str(data), output_dir=str(tmp_path / "out"), ckpt_dir=str(tmp_path / "models"))
    message = find_bad_input(caught.value)
    assert message is not None, caught.value
    for word in words:
        assert word in message
    assert not (tmp_path / "models" / "model.pt").exists()


def refusal_of_a_student(workflow: Callable[..., None], data: Path, chain: Chain, tmp_path: Path) -> str:
    """What a student's training on ``data`` says before it begins."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow(
            "student",
            dataset_dir=str(data),
            teacher_path=str(chain.model("teacher")),
            output_dir=str(tmp_path / "out"),
            ckpt_dir=str(tmp_path / "models"),
        )
    message = find_bad_input(caught.value)
    assert message is not None, caught.value
    return message


def test_a_student_without_unlabeled_images(
    data: Path, workflow: Callable[..., None], chain: Chain, tmp_path: Path
) -> None:
    edit_datalist(data, lambda content: content.pop("unlabeled"))
    message = refusal_of_a_student(workflow, data, chain, tmp_path)
    assert "unlabeled" in message
    assert "teacher" in message
    assert not (tmp_path / "models" / "model.pt").exists()


def test_a_teacher_of_other_widths(phantoms: Path, workflow: Callable[..., None], tmp_path: Path) -> None:
    save_weights(SegmentationNetwork(3, 1, 3, [6, 8, 8, 8], [3] * 4, [1, 2, 2, 1]), tmp_path / "other.pt")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow(
            "student",
            dataset_dir=str(phantoms),
            teacher_path=str(tmp_path / "other.pt"),
            output_dir=str(tmp_path / "out"),
            ckpt_dir=str(tmp_path / "models"),
        )
    message = find_bad_input(caught.value)
    assert "other.pt" in message
    assert "(6, 1, 3, 3, 3) in the weights, (4, 1, 3, 3, 3) in the network" in message
    assert not (tmp_path / "models" / "model.pt").exists()


@pytest.mark.parametrize(
    ("bundle", "role"), [("student", "teacher"), ("dual_decoder", "student")], ids=["student", "dual_decoder"]
)
def test_a_stage_before_that_was_not_trained(
    bundle: str, role: str, phantoms: Path, workflow: Callable[..., None], tmp_path: Path
) -> None:
    folders = {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "models")}
    absent = {f"{role}_path": str(tmp_path / "absent.pt")}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow(bundle, dataset_dir=str(phantoms), **folders, **absent)
    message = find_bad_input(caught.value)
    assert str(tmp_path / "absent.pt") in message
    assert "Train the stage" in message
    assert not (tmp_path / "models" / "model.pt").exists()


@pytest.mark.parametrize("names", [("train.json", "evaluate.json"), ("inference.json",)], ids=["evaluate", "predict"])
def test_weights_trained_with_other_settings(
    names: tuple[str, ...], chain: Chain, workflow: Callable[..., None], tmp_path: Path
) -> None:
    use = (
        {"input": str(first(chain.data, "image"))} if names == ("inference.json",) else {"dataset_dir": str(chain.data)}
    )
    target = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 1.0}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow(
            "dual_decoder",
            names=names,
            ckpt_dir=str(chain.model("dual_decoder").parent),
            output_dir=str(tmp_path / "out"),
            spacing=[1.0, 1.0, 2.0],
            targets=[target],
            **use,
        )
    message = find_bad_input(caught.value)
    for words in ("model.pt", "spacing: trained with [1.0, 1.0, 1.0], found [1.0, 1.0, 2.0]", "'scale': 2.0"):
        assert words in message


def test_a_reference_with_unknown_labels_is_not_evaluated(
    data: Path, chain: Chain, workflow: Callable[..., None], tmp_path: Path
) -> None:
    rewrite(first(data, "label", "validation"), lambda array: np.where(array == 2, 7, array).astype(np.uint8))
    weights = {"ckpt_dir": str(chain.model("teacher").parent), "output_dir": str(tmp_path / "out")}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("teacher", names=("train.json", "evaluate.json"), dataset_dir=str(data), **weights)
    message = find_bad_input(caught.value)
    assert "the label ids 7," in message
    assert "phantom_validation_000" in message
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["input", "--input"]),
        ({"input": "EMPTY"}, ["input", "EMPTY", "no volume"]),
        ({"input": "IMAGE", "ckpt_dir": "EMPTY"}, ["EMPTY/model.pt", "Train the stage"]),
    ],
    ids=["no input", "empty folder", "no weights"],
)
def test_nothing_to_predict(
    settings: dict[str, str],
    words: list[str],
    chain: Chain,
    workflow: Callable[..., None],
    tmp_path: Path,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"EMPTY": str(empty), "IMAGE": str(first(chain.data, "image"))}

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    settings = {
        "ckpt_dir": str(chain.model("dual_decoder").parent),
        "output_dir": str(tmp_path / "out"),
        **{key: placed(value) for key, value in settings.items()},
    }
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("dual_decoder", names=("inference.json",), **settings)
    message = find_bad_input(caught.value)
    assert message is not None, caught.value
    for word in words:
        assert placed(word) in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch_size": [16, 16, 18]}, ["patch_size", "[4, 4, 4]"]),
        ({"amp": "fp8"}, ["amp", "fp8"]),
        ({"compile": "maybe"}, ["compile", "maybe"]),
        ({"select": "newest"}, ["select", "newest"]),
        ({"output_dir": "FILE/below"}, ["FILE/below"]),
        ({"learning_rate": 1e30}, ["learning_rate", "diverged"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(
    settings: dict[str, Any], words: list[str], phantoms: Path, workflow: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "FILE").write_text("not a folder")
    settings = {k: v.replace("FILE", str(tmp_path / "FILE")) if isinstance(v, str) else v for k, v in settings.items()}
    folders = {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "models")}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("teacher", dataset_dir=str(phantoms), **{**folders, **settings})
    message = find_bad_input(caught.value)
    assert message is not None, caught.value
    for word in words:
        assert word in message
    assert not (tmp_path / "models" / "model.pt").exists()


def test_a_case_smaller_than_the_patch_is_padded(data: Path, workflow: Callable[..., None], tmp_path: Path) -> None:
    for key in ("image", "label"):
        rewrite(first(data, key), lambda array: array[:12, :20, :9])
    workflow("teacher", dataset_dir=str(data), output_dir=str(tmp_path / "out"), ckpt_dir=str(tmp_path / "models"))
    weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_the_command_line_says_it_plainly(tmp_path: Path) -> None:
    done = run(
        [config("teacher", "train.json")],
        {
            "dataset_dir": str(tmp_path / "absent"),
            "output_dir": str(tmp_path),
            "ckpt_dir": str(tmp_path),
            "device": "cpu",
        },
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert str(tmp_path / "absent") in done.stderr


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut, "can't be read (EOFError"),
    "NaN": (lambda path: rewrite(path, with_nan), "has 1 NaN or infinite voxels"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unlabelled_image_that_cannot_be_learnt_from(
    name: str, data: Path, chain: Chain, workflow: Callable[..., None], tmp_path: Path
) -> None:
    spoil, words = UNUSABLE[name]
    spoil(first(data, "image", "unlabeled"))
    message = refusal_of_a_student(workflow, data, chain, tmp_path)
    assert f"{first(data, 'image', 'unlabeled')} {words}" in message
    assert not (tmp_path / "models" / "model.pt").exists()


@pytest.mark.parametrize(("key", "name"), [("image", "truncated"), ("image", "NaN"), ("thickness", "truncated")])
def test_a_case_that_cannot_be_evaluated(
    key: str, name: str, data: Path, chain: Chain, workflow: Callable[..., None], tmp_path: Path
) -> None:
    spoil, words = UNUSABLE[name]
    spoil(first(data, key, "validation"))
    weights = {"ckpt_dir": str(chain.model("dual_decoder").parent), "output_dir": str(tmp_path / "out")}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("dual_decoder", names=("train.json", "evaluate.json"), dataset_dir=str(data), **weights)
    message = find_bad_input(caught.value)
    assert message is not None, caught.value
    assert f"{key} {first(data, key, 'validation')} {words}".removeprefix("image ") in message
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_truncated_reference_is_named_by_the_command_line(data: Path, chain: Chain, tmp_path: Path) -> None:
    label = first(data, "label", "validation")
    cut(label)
    done = run(
        [config("teacher", "train.json"), config("teacher", "evaluate.json"), str(chain.plan)],
        {
            "dataset_dir": str(data),
            "ckpt_dir": str(chain.model("teacher").parent),
            "output_dir": str(tmp_path / "out"),
            "device": "cpu",
            "amp": False,
        },
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"error: label {label} can't be read (EOFError" in done.stderr
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_disk_that_fills_up_at_inference_by_the_command_line(plan: Path, tmp_path: Path, full_disk: Callable) -> None:
    parser = ConfigParser()
    parser.read_config([config("dual_decoder", "inference.json")])
    parser.update(PLAN)
    torch.manual_seed(0)
    save_weights(parser.get_parsed_content("network_def"), tmp_path / "models" / "model.pt")
    scans, output = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    noise = np.random.default_rng(0).integers(-1000, 200, (24, 24, 24)).astype(np.int16)
    for name, voxels in (("a", noise), ("b", noise[:4, :4, :4]), ("c", noise)):
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), scans / f"{name}.nii.gz")
    output.mkdir()
    older = b"a label of last week"
    (output / "c_seg.nii.gz").write_bytes(older)
    with full_disk(1000):
        done = run(
            [config("dual_decoder", "inference.json"), str(plan)],
            {
                "input": str(scans),
                "output_dir": str(output),
                "ckpt_dir": str(tmp_path / "models"),
                "device": "cpu",
                "amp": False,
            },
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: 2 of 3 cases failed" in done.stderr
    for name in ("a", "c"):
        reason = f"{scans / name}.nii.gz: {output / name}_seg.nii.gz: can't be written (File too large)"
        assert f"\n  {reason}" in done.stderr
    # Nothing of the case that could not be written, all of the small one, and what was there.
    written = ["b.json", "b_seg.nii.gz", "b_thickness.nii.gz", "c_seg.nii.gz"]
    assert sorted(path.name for path in output.iterdir()) == written
    assert (output / "c_seg.nii.gz").read_bytes() == older
    assert nibabel.load(output / "b_thickness.nii.gz").get_fdata().shape == (4, 4, 4)
