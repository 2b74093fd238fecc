"""Inference as a user runs it, with weights that were never trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, PLAN, config, run
from monai.bundle import ConfigParser

from common.errors import find_bad_input
from common.networks import read_weights, save_weights, state_digest
from common.transforms import LoadCased
from common.transforms.familiarity import familiar_ranges, measure_image

SHAPE = (20, 18, 16)
OF_LABELS = ("nothing_found", "border")  # what random weights find


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a bundle's weights, random but always the same."""

    def make(bundle: str, **settings: object) -> str:
        parser = ConfigParser()
        parser.read_config([config(bundle, "inference.json")])
        parser.update({**PLAN, **settings})
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(bundle)
        save_weights(parser.get_parsed_content("network_def"), folder / "model.pt")
        return str(folder)

    return make


def make_scan(seed: int = 0) -> np.ndarray:
    """Hounsfield units, coarse enough that random weights find more than one class."""
    coarse = np.random.default_rng(seed).integers(-1000, 200, [size // 2 for size in SHAPE])
    return coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2).astype(np.int16)


def write_scan(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def label(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_the_bundles_have_the_same_options() -> None:
    first, *others = (json.loads(Path(config(bundle, "inference.json")).read_text()) for bundle in BUNDLES)
    for other in others:
        for key in ("input", "num_workers", "test_mirror_axes", "largest_component", "overview", "dicom_seg"):
            assert first[key] == other[key]
        for key in ("dataset", "dataloader", "run"):
            assert first[key] == other[key]
        # Which voxels count as air depends on what is measured.
        assert {**first["inferer"], "air": None} == {**other["inferer"], "air": None}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_mirroring_reaches_the_inferer(bundle: str, plan: Path) -> None:
    parser = ConfigParser()
    parser.read_config([config(bundle, "inference.json"), str(plan)])
    assert parser.get_parsed_content("inferer").mirror_axes == ()
    parser.update({"test_mirror_axes": [0, 2]})
    parser.parse(reset=True)
    assert parser.get_parsed_content("inferer").mirror_axes == (0, 2)


def test_a_folder_with_a_broken_file_by_the_command_line(weights: Callable[..., str], tmp_path: Path) -> None:
    whole = write_scan(tmp_path / "scans" / "Ärzte, 1. Aufnahme.nii.gz", make_scan())
    write_scan(tmp_path / "scans" / "flat.nii.gz", make_scan()[..., 0])
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "scans" / "text.nii").write_text("no image")
    (tmp_path / "scans" / "stray.dcm").write_bytes(bytes(128) + b"DICM")
    settings = {"input": str(tmp_path / "scans"), "output_dir": str(tmp_path / "out"), "overview": "true"}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({**PLAN, "num_workers": 1}))
    done = run(
        [config("dual_decoder", "inference.json"), str(plan)],
        {**settings, "ckpt_dir": weights("dual_decoder"), "device": "cpu"},
    )
    assert done.returncode == 1
    assert "4 of 5 cases failed" in done.stderr
    for name in ("broken.nii.gz", "flat.nii.gz", "text.nii", "stray.dcm"):
        assert f"\n  {tmp_path / 'scans' / name}" in done.stderr
    assert "Traceback" not in done.stderr
    case = "Ärzte, 1. Aufnahme"
    files = [".json", "_overview.png", "_seg.nii.gz", "_thickness.nii.gz"]
    assert names(tmp_path / "out") == [case + file for file in files]


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAL"])
def test_the_labels_of_a_turned_file_are_the_turned_labels(
    codes: str, weights: Callable[..., str], workflow: Callable[..., None], tmp_path: Path
) -> None:
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    straight = nibabel.Nifti1Image(make_scan(), np.diag([1.0, 1.5, 2.0, 1.0]))
    nibabel.save(straight, tmp_path / "a.nii")
    (tmp_path / "turned").mkdir()
    nibabel.save(straight.as_reoriented(turn), tmp_path / "turned" / "a.nii")
    folder = weights("teacher")
    for name, source in (("out", tmp_path / "a.nii"), ("out turned", tmp_path / "turned")):
        output = str(tmp_path / name)
        workflow("teacher", names=("inference.json",), input=str(source), output_dir=output, ckpt_dir=folder)
    expected, found = (nibabel.load(tmp_path / name / "a_seg.nii.gz") for name in ("out", "out turned"))
    assert found.shape == nibabel.load(tmp_path / "turned" / "a.nii").shape
    assert np.allclose(found.affine, straight.affine @ inv_ornt_aff(turn, SHAPE))
    back = found.as_reoriented(io_orientation(found.affine))
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(expected.dataobj))
    assert len(np.unique(np.asarray(expected.dataobj))) > 1


@pytest.mark.parametrize("upwards", [True, False])
def test_a_dicom_series_gives_what_its_nifti_gives(
    upwards: bool, weights: Callable[..., str], workflow: Callable[..., None], tmp_path: Path
) -> None:
    highdicom = pytest.importorskip("highdicom")
    from dicom_series import SAGITTAL, write_series

    volume = make_scan().transpose(2, 1, 0)
    write_series(tmp_path / "patients" / "p 1", volume, SAGITTAL, upwards)
    settings = {"names": ("inference.json",), "ckpt_dir": weights("teacher")}
    source, out = str(tmp_path / "patients"), tmp_path / "out"
    workflow("teacher", input=source, output_dir=str(out), dicom_seg=True, overview=True, **settings)
    assert names(out) == ["p 1.json", "p 1_overview.png", "p 1_seg.dcm", "p 1_seg.nii.gz"]
    found = nibabel.load(out / "p 1_seg.nii.gz")
    ids = np.asarray(found.dataobj)
    assert ids.shape == volume.T.shape
    assert len(np.unique(ids)) > 1

    # Slices are sorted by position: along the cross product of the rows' and columns' directions.
    pixels = volume.T if upwards else volume.T[..., ::-1]
    write_scan(tmp_path / "nifti" / "p 1.nii.gz", pixels, found.affine)
    workflow("teacher", input=str(tmp_path / "nifti"), output_dir=str(tmp_path / "same"), **settings)
    assert np.array_equal(label(tmp_path / "same" / "p 1_seg.nii.gz"), ids)

    box = highdicom.seg.segread(out / "p 1_seg.dcm").get_volume(combine_segments=True)
    index = np.argwhere(box.array)
    to_label = np.linalg.inv(found.affine) @ np.diag([-1, -1, 1, 1]) @ box.affine
    placed = np.zeros_like(ids)
    placed[tuple(np.rint(np.c_[index, np.ones(len(index))] @ to_label.T[:, :3]).astype(int).T)] = box.array[
        tuple(index.T)
    ]
    assert np.array_equal(placed, ids)


def test_a_file_a_channel(weights: Callable[..., str], workflow: Callable[..., None], tmp_path: Path) -> None:
    scans = [make_scan(seed) for seed in (1, 2)]
    for channel, scan in enumerate(scans):
        write_scan(tmp_path / "raw" / f"a_{channel:04d}.nii.gz", scan)
    settings = {"names": ("inference.json",), "channels": 2, "ckpt_dir": weights("teacher", channels=2)}
    write_scan(tmp_path / "one" / "b.nii.gz", np.stack(scans, axis=-1))
    for folder, case in (("raw", "a"), ("one", "b")):
        workflow("teacher", input=str(tmp_path / folder), output_dir=str(tmp_path / f"out {folder}"), **settings)
        assert names(tmp_path / f"out {folder}") == [f"{case}.json", f"{case}_seg.nii.gz"]
    raw, one = label(tmp_path / "out raw" / "a_seg.nii.gz"), label(tmp_path / "out one" / "b_seg.nii.gz")
    assert np.array_equal(raw, one)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_case_unlike_the_training_says_so(
    bundle: str, weights: Callable[..., str], workflow: Callable[..., None], tmp_path: Path, capfd: Any
) -> None:
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    scan = make_scan()
    write_scan(tmp_path / "scans" / "a.nii.gz", scan, affine)
    write_scan(tmp_path / "scans" / "b.nii.gz", scan, np.diag([1.0, 1.5, 4.0, 1.0]))
    write_scan(tmp_path / "scans" / "c.nii.gz", scan + 1024, affine)
    loaded = LoadCased(["image"])({"image": str(tmp_path / "scans" / "a.nii.gz")})["image"]
    familiar = familiar_ranges([measure_image(loaded)], [True])
    folder = weights(bundle)
    digest = state_digest(read_weights(f"{folder}/model.pt"))
    record = {"weights": digest, "entropy": {"mean": 1e-6, "sd": 1e-6, "n": 5}}
    (Path(folder) / "model.json").write_text(json.dumps(record))
    settings = {"names": ("inference.json",), "input": str(tmp_path / "scans"), "ckpt_dir": folder}
    found = {}
    for name, more in (("all", {"familiar": familiar}), ("own", {"entropy_from": "null"})):
        workflow(bundle, output_dir=str(tmp_path / name), **settings, **more)
        printed = "".join(capfd.readouterr())
        for case in "abc":
            warnings = result(tmp_path / name / f"{case}.json")["warnings"]
            found[name, case] = {warning["kind"] for warning in warnings}
            assert all(f"{case}: {warning['text']}" in printed for warning in warnings)
    assert found["all", "a"] - found["own", "a"] == {"entropy"}
    assert found["all", "b"] - found["own", "b"] == {"entropy", "spacing", "field_of_view"}
    assert found["all", "c"] - found["own", "c"] == {"entropy", "intensity"}


def test_an_image_of_two_dimensions(weights: Callable[..., str], workflow: Callable[..., None], tmp_path: Path) -> None:
    plane = {"spatial_dims": 2, "spacing": [1.0, 1.0], "patch_size": [16, 16]}
    affine = np.diag([-0.8, 1.2, 1.0, 1.0])
    write_scan(tmp_path / "a.nii.gz", make_scan()[..., 0], affine)
    settings = {"names": ("inference.json",), "ckpt_dir": weights("teacher", **plane), "overview": True, **plane}
    ranges = {"spacing": [[0.8, 0.8], [0.5, 0.6]], "extent": [[16.0, 16.0], [21.6, 21.6]]}
    settings["familiar"] = {"cases": 3, **ranges, "intensity": []}
    workflow("teacher", input=str(tmp_path / "a.nii.gz"), output_dir=str(tmp_path / "out"), **settings)
    assert names(tmp_path / "out") == ["a.json", "a_overview.png", "a_seg.nii.gz"]
    found = nibabel.load(tmp_path / "out" / "a_seg.nii.gz")
    assert np.squeeze(found.dataobj).shape == SHAPE[:2]
    (warning,) = (w for w in result(tmp_path / "out" / "a.json")["warnings"] if w["kind"] not in OF_LABELS)
    assert warning["kind"] == "spacing"
    assert "1.2 mm front-back (0.5 to 0.6)" in warning["text"]
    assert np.allclose(found.affine, affine)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dicom_seg": True}, r"dicom_seg: .*a\.nii\.gz is no folder with a DICOM series"),
        ({"overview": "yes"}, "overview: found 'yes'"),
        ({"output_dir": "SCANS"}, "own folder"),
    ],
)
def test_options_that_can_t_be_met_are_refused_before_predicting(
    settings: dict[str, object],
    words: str,
    weights: Callable[..., str],
    workflow: Callable[..., None],
    tmp_path: Path,
) -> None:
    pytest.importorskip("highdicom")
    write_scan(tmp_path / "scans" / "a.nii.gz", make_scan())
    places = {"output_dir": str(tmp_path / "out"), "ckpt_dir": weights("teacher"), "input": str(tmp_path / "scans")}
    settings = {key: str(tmp_path / "scans") if value == "SCANS" else value for key, value in settings.items()}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("teacher", names=("inference.json",), **{**places, **settings})
    message = find_bad_input(caught.value)
    assert message is not None, caught.value
    assert re.search(words, message), message
    assert not list(tmp_path.glob("**/a_seg*"))
