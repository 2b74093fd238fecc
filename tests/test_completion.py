"""Labels that predictions complete: what they keep, what they add, and how they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from common import completion
from common.__main__ import main
from common.completion import complete, completed_cases, merge_predictions
from common.data import load_section
from common.errors import BadInput
from common.networks import SegmentationNetwork, save_weights, state_digest

LABELS = {"0": "background", "1": "liver", "2": "spleen", "3": "kidney"}
SHAPE = (8, 8, 12)


def test_merging_by_hand() -> None:
    """Annotated for 1; of 2 and 3 the more probable one above 1/2, at equality the first."""
    label = np.array([0, 0, 0, 0, 0, 1, 0], np.uint8)
    spleen = np.array([0.4, 0.6, 0.6, 0.9, 0.7, 0.9, 0.5])
    kidney = np.array([0.3, 0.2, 0.8, 0.2, 0.7, 0.9, 0.5])
    sure_liver = np.ones(7)
    completed = merge_predictions(label, [1], {1: sure_liver, 2: spleen, 3: kidney})
    assert completed.tolist() == [0, 2, 3, 2, 2, 1, 0]
    assert completed.dtype == np.uint8
    assert label.tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert merge_predictions(label, [1, 2, 3], {}).tolist() == label.tolist()


def write_teacher(folder: Path, organ: str) -> str:
    network = SegmentationNetwork(3, 1, 2, [2, 4], [3, 3], [1, 2], 1)
    network_def = {
        "_target_": "common.networks.SegmentationNetwork",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": "$len(@classes)",
        "features": [2, 4],
        "kernel_sizes": [3, 3],
        "strides": [1, 2],
        "convolutions_per_stage": 1,
    }
    config = {
        "labels": LABELS,
        "organ": organ,
        "channels": 1,
        "spacing": [1.0, 1.0, 1.0],
        "intensity": {"kind": "zscore"},
        "patch_size": [8, 8, 8],
        "network_def": network_def,
    }
    path = folder / f"{organ}.pt"
    save_weights(network, path)
    path.with_suffix(".json").write_text(json.dumps({"weights": state_digest(network.state_dict()), "config": config}))
    return str(path)


@pytest.fixture
def teachers(tmp_path: Path) -> dict[str, str]:
    return {organ: write_teacher(tmp_path / "teachers", organ) for organ in ("liver", "spleen", "kidney")}


@pytest.fixture
def datalist(tmp_path: Path) -> Path:
    """One case of the liver, one of spleen and kidney, one of all; voxels of 1.5 mm, mirrored in their file."""
    generator, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    affine = np.diag([-1.5, 1.5, 1.5, 1.0])
    entries: list[dict[str, Any]] = []
    for name, annotated in (("a", [1]), ("b", [0, 2, 3]), ("c", None)):
        label = generator.integers(0, 4, SHAPE).astype(np.uint8)
        label[~np.isin(label, annotated or [1, 2, 3])] = 0
        for kind, array in (("image", generator.normal(size=SHAPE).astype(np.float32)), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}_{kind}.nii.gz")
        entry = {"image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz", "patient": name}
        entries.append(entry if annotated is None else {**entry, "annotated": annotated})
    path = folder / "datalist.json"
    path.write_text(json.dumps({"labels": LABELS, "training": entries, "validation": [entries[2]]}))
    return path


def voxels(path: str | Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_what_people_labelled_stays_and_the_rest_is_predicted(
    datalist: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    written = complete(datalist, teachers, tmp_path / "completed")
    assert written == (tmp_path / "completed" / "datalist.json").resolve()
    cases = load_section(written, "training", ("image", "label", "completed"))
    before = load_section(datalist, "training")
    for case, original in zip(cases, before, strict=True):
        assert {key: case.get(key) for key in original} == original
    for case, added in zip(cases[:2], ({2, 3}, {1}), strict=True):
        reference, completed = voxels(case["label"]), voxels(case["completed"])
        for known in set(case["annotated"]) - {0}:
            assert np.array_equal(completed == known, reference == known)
        assert set(np.unique(completed[reference == 0])) - {0} <= added
        assert (completed != reference).any(), "untrained teachers find something everywhere"
        assert np.array_equal(nibabel.load(case["completed"]).affine, nibabel.load(case["image"]).affine)
    assert cases[2]["completed"] == cases[2]["label"], "nothing to add"
    assert load_section(written, "validation") == load_section(datalist, "validation")


def test_a_prediction_lies_where_its_organ_is(
    datalist: Path, teachers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bright voxels are liver: the prediction comes back through orientation and voxel size."""
    image = np.zeros(SHAPE, np.float32)
    image[:3, 2:6, 4:] = 10
    case = json.loads(datalist.read_text())["training"][1]
    path = datalist.parent / case["image"]
    nibabel.save(nibabel.Nifti1Image(image, nibabel.load(path).affine), path)

    class Bright(SegmentationNetwork):
        def forward(self, x):
            return 10 * (x - 1).repeat(1, 2, 1, 1, 1) * x.new_tensor([0, 1]).reshape(1, 2, 1, 1, 1)

    read = completion.read_organ_teacher
    bright = Bright(3, 1, 2, [2, 4], [3, 3], [1, 2])
    monkeypatch.setattr(completion, "read_organ_teacher", lambda path, organ: (bright, read(path, organ)[1]))
    done = load_section(complete(datalist, teachers, tmp_path / "out"), "training", ("label", "completed"))[1]
    reference, completed = voxels(done["label"]), voxels(done["completed"])
    liver = completed == 1
    assert liver[:2, 2:6, 5:][reference[:2, 2:6, 5:] == 0].all()
    assert not liver[4:].any()
    assert not liver[..., :3].any()


def test_what_is_there_is_not_made_again(
    datalist: Path, teachers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped goes on where it was, and a label that was corrected stays so."""
    output = tmp_path / "completed"
    write, written = completion.write_nifti, []

    def stop_at_the_second(path: Path, image: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, image)

    monkeypatch.setattr(completion, "write_nifti", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        complete(datalist, teachers, output)
    assert written == ["a_image.nii.gz"]
    assert not (output / "datalist.json").exists(), "it names no file that is not there"

    first = output / "labels" / "a_image.nii.gz"
    corrected = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), nibabel.load(first).affine)
    nibabel.save(corrected, first)
    made: list[str] = []
    monkeypatch.setattr(completion, "write_nifti", lambda path, image: (made.append(path.name), write(path, image)))
    complete(datalist, teachers, output)
    assert made == ["b_image.nii.gz"]
    assert not voxels(first).any()
    monkeypatch.setattr(completion, "read_organ_teacher", lambda *arguments: pytest.fail("nothing is left to predict"))
    complete(datalist, teachers, output)


def test_other_teachers_have_a_folder_of_their_own(datalist: Path, teachers: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "completed"
    complete(datalist, teachers, output)
    others = {**teachers, "liver": write_teacher(tmp_path / "others", "liver")}
    with pytest.raises(BadInput, match=r"completed from something else \(teachers; see"):
        complete(datalist, others, output)
    folders = {
        Path(completed_cases(datalist, given, tmp_path / "own")[0]["completed"]).parents[1]
        for given in (teachers, others, teachers)
    }
    assert len(folders) == 2


def test_a_label_that_has_changed_is_not_completed_by_the_old_one(
    datalist: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "completed"
    complete(datalist, teachers, output)
    before = completed_cases(datalist, teachers, tmp_path / "own")
    content = json.loads(datalist.read_text())
    case = {key: content["training"][0][key] for key in ("image", "label")}
    datalist.write_text(json.dumps({**content, "training": [*content["training"], {**case, "image": "new.nii.gz"}]}))
    (datalist.parent / "new.nii.gz").write_bytes((datalist.parent / case["image"]).read_bytes())
    complete(datalist, teachers, output)  # a case more takes nothing away
    content["training"][0]["annotated"] = [1, 2]  # somebody has looked for the spleen, too
    datalist.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"something else \(a_image; see"):
        complete(datalist, teachers, output)
    after = completed_cases(datalist, teachers, tmp_path / "own")
    assert after[0]["completed"] != before[0]["completed"]
    assert not (voxels(after[0]["completed"]) == 2).any(), "people found no spleen there"
    swapped = {**LABELS, "2": LABELS["3"], "3": LABELS["2"]}
    datalist.write_text(json.dumps({**content, "labels": swapped}))
    with pytest.raises(BadInput, match=r"something else \(labels, a_image; see"):
        complete(datalist, teachers, output)


def test_cases_for_a_training(datalist: Path, teachers: dict[str, str], tmp_path: Path) -> None:
    cases = completed_cases(datalist, teachers, tmp_path / "completed")
    assert [case.get("annotated") for case in cases] == [[1], [0, 2, 3], None]
    assert all(case["label"] == case["completed"] for case in cases)
    written = Path(cases[0]["completed"]).parents[1] / "datalist.json"
    assert completed_cases(written, None, tmp_path / "unused") == cases
    assert not (tmp_path / "unused").exists()
    with pytest.raises(BadInput, match="teacher_paths"):
        completed_cases(datalist, None, tmp_path / "unused")


def test_cases_of_one_name(datalist: Path, teachers: dict[str, str], tmp_path: Path) -> None:
    content = json.loads(datalist.read_text())
    content["training"].append(content["training"][0])
    datalist.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="two cases are called a_image"):
        complete(datalist, teachers, tmp_path / "completed")


def test_on_the_command_line(
    datalist: Path, teachers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["complete", "--datalist", str(datalist), "--output", str(tmp_path / "completed"), "--device", "cpu"]
    assert main([*options, "--teachers", *(f"{organ}={path}" for organ, path in teachers.items())]) == 0
    assert str(tmp_path / "completed" / "datalist.json") in capsys.readouterr().out
    assert main([*options, "--teachers", "liver"]) == 1
    assert "NAME=WEIGHTS" in capsys.readouterr().err
