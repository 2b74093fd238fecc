"""What goes into a packed bundle, and what doesn't."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import BUNDLES, PLAN, ROOT, config
from monai.bundle import ConfigParser

from common.__main__ import main
from common.errors import BadInput
from common.networks import read_weights, state_digest
from common.packing import pack_bundle
from common.packing.metadata import classes_of, output_channels
from common.packing.verify import verify_archive

Pack = Callable[..., Path]
SUMMARY = {
    "cases": 2,
    "mean_dice": 0.75,
    "labels": {
        "lumen": {"dice": {"mean": 0.8, "sd": 0.1, "n": 2}, "hd95": {"mean": 2.0}, "asd": {"mean": None}, "failed": 0},
        "wall": {"dice": {"mean": 0.7, "sd": 0.1, "n": 2}, "failed": 1},
    },
    "targets": {"thickness": {"unit": "mm", "voxels": {"mae": 0.25, "rmse": 0.5, "r2": 0.9, "n": 10}}},
    "failures": [{"case": "patient_0815", "label": "wall", "reason": "prediction empty"}],
}


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_same_input_gives_the_same_bytes(pack: Pack, trained: dict[str, Path], tmp_path: Path) -> None:
    first = pack()
    copies = tmp_path / "elsewhere"
    copies.mkdir()
    for path in (trained["dual_decoder"], trained["dual_decoder"].with_suffix(".json"), trained["plan"]):
        shutil.copyfile(path, copies / path.name)
    second = pack(name="again.zip", plan=copies / "plan.json", weights=copies / "model.pt")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o100644}


def test_it_is_a_bundle_that_sha256sum_checks(packed: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(packed["dual_decoder"]) as archive:
        archive.extractall(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dual_decoder"]
    root = tmp_path / "dual_decoder"
    assert sorted(p.name for p in root.iterdir()) == [
        *("LICENSE", "checksums.sha256", "configs", "docs", "models", "scripts")
    ]
    assert sorted(p.name for p in (root / "models").iterdir()) == ["model.json", "model.pt"]
    own = {path.relative_to(ROOT / "common") for path in (ROOT / "common").rglob("*.py") if path.name[0] != "."}
    assert {path.relative_to(root / "scripts/common") for path in (root / "scripts/common").rglob("*.py")} == own
    checked = subprocess.run(["sha256sum", "--check", "--strict", "checksums.sha256"], cwd=root, capture_output=True)
    assert checked.returncode == 0
    assert len(checked.stdout.splitlines()) == sum(path.is_file() for path in root.rglob("*")) - 1


def _plain(value: Any) -> Any:
    """Names as they are in the checkout."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    text = value.replace("$import scripts.common as common", "$import common") if isinstance(value, str) else value
    return text.replace("scripts.common", "common") if isinstance(text, str) else text


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize(
    "names", [["train"], ["train", "evaluate"], ["train", "multi_gpu_train"], ["inference"]], ids=str
)
def test_configs_say_what_config_plan_and_overlays_say_together(
    bundle: str, names: list[str], packed: dict[str, Path], trained: dict[str, Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(packed[bundle]) as archive:
        archive.extractall(tmp_path)
    files = [str(tmp_path / bundle / "configs" / f"{name}.json") for name in names]
    found = ConfigParser.load_config_files(files)
    expected = ConfigParser.load_config_files(
        [*(config(bundle, f"{name}.json") for name in names), str(trained["plan"])]
    )
    # MONAI finds a bundle's code after `initialize` and before `run`.
    expected["run"] = ["$@bundle_root", *expected.pop("initialize"), *expected["run"]]
    weights = state_digest(read_weights(trained[bundle]))
    assert found.pop("bundle_root") == f"$common.bundle_root('{bundle}', '1.0.0+{weights}')"
    del expected["bundle_root"]
    if names == ["inference"]:
        expected = {key: expected[key] for key in found}
    assert _plain(found) == expected
    text = json.dumps(found)
    assert '"$import scripts.common as common"' in text
    assert '"common.' not in text


def test_an_overlay_of_the_training_is_in_every_config_that_it_concerns(
    pack: Pack, train: Callable[..., Path], trained: dict[str, Path], tmp_path: Path
) -> None:
    overlay = write(
        tmp_path / "overlay.json",
        {
            "rate": 0.25,
            "network_def#dropout": "@rate",
            "inferer#mode": "constant",
            "largest_component": True,
            "train#optimizer#nesterov": False,
            "validate#key_metric": {"other": {"_target_": "common.handlers.TargetError", "targets": []}},
        },
    )
    weights = train("teacher", tmp_path, trained["plan"])
    files = contents(pack("teacher", weights=weights, overlays=[overlay]))
    inference, training, evaluate = (
        json.loads(files[f"configs/{name}.json"]) for name in ("inference", "train", "evaluate")
    )
    assert inference["rate"] == 0.25  # because the network refers to it
    assert inference["network_def"]["dropout"] == "@rate"
    assert inference["inferer"]["mode"] == evaluate["inferer"]["mode"] == training["inferer"]["mode"] == "constant"
    assert inference["largest_component"] is evaluate["largest_component"] is True
    assert training["train"]["optimizer"]["nesterov"] is False
    assert "train" not in inference
    assert evaluate["validate#key_metric"]["other"]["_target_"] == "scripts.common.handlers.TargetError"


def test_metadata_card_and_record_describe_these_weights(pack: Pack, tmp_path: Path, trained: dict[str, Path]) -> None:
    given = {"authors": "A group", "data_source": "Two scanners"}
    files = contents(
        pack(
            version="2.1.0",
            evaluation=write(tmp_path / "summary.json", SUMMARY),
            metadata=write(tmp_path / "said.json", given),
            overlays=[write(tmp_path / "seen.json", {"targets#0#range": [0.5, 4.0]})],
        )
    )
    metadata = json.loads(files["configs/metadata.json"])
    assert metadata["version"] == "2.1.0"
    assert "2.1.0" in metadata["changelog"]
    assert metadata["pytorch_version"] == torch.__version__.split("+")[0]
    assert (metadata["authors"], metadata["data_source"]) == ("A group", "Two scanners")
    assert metadata["eval_metrics"] == {
        "cases": 2,
        "mean_dice": 0.75,
        "dice/lumen": 0.8,
        "hd95/lumen": 2.0,
        "dice/wall": 0.7,
        "thickness/mae": 0.25,
        "thickness/rmse": 0.5,
        "thickness/r2": 0.9,
    }
    image = metadata["network_data_format"]["inputs"]["image"]
    assert (image["spatial_shape"], image["spacing"]) == (["16*n"] * 3, [1.0, 1.0, 1.0])
    assert (image["modality"], image["value_range"]) == ("CT", [-1.0, 3.0])
    prediction = metadata["network_data_format"]["outputs"]["pred"]
    assert prediction["channel_def"] == {"0": "background", "1": "lumen", "2": "wall", "3": "thickness (mm)"}
    assert prediction["num_channels"] == 4
    record = json.loads(files["models/model.json"])
    assert record["config"]["labels"] == {"0": "background", "1": "lumen", "2": "wall"}
    assert metadata["lineage"] == {
        "stage": "dual_decoder",
        "weights": record["weights"],
        "parents": {"student": {"stage": "student", "weights": "ab" * 32, "parents": {}}},
    }
    card = files["docs/README.md"].decode()
    assert card.startswith("# dual_decoder 2.1.0\n")
    assert "| dice lumen | 0.8 |" in card
    assert "| thickness mae [mm] | 0.25 |" in card
    assert "| measures thickness | dense, mm, trained on 0.5 to 4 |" in card
    assert "bundles/" not in card
    assert "checkout" not in card


def test_what_cases_are_compared_with_goes_along(train: Callable[..., Path], tmp_path: Path) -> None:
    """The plan's ranges, and the validation's entropies: those of the record, else those of the evaluation."""
    familiar = {"cases": 4, "spacing": [[1.0, 1.0]] * 3, "extent": [[20.0, 30.0]] * 3, "intensity": []}
    plan = write(tmp_path / "plan.json", {**PLAN, "familiar": familiar})
    weights = train("student", tmp_path, plan)
    own, other = ({"mean": mean, "sd": 0.01, "n": 9} for mean in (0.1, 0.2))
    evaluation = write(tmp_path / "summary.json", {"cases": 9, "labels": {}, "targets": {}, "entropy": other})
    record = json.loads(weights.with_suffix(".json").read_text())
    for kept, expected in (({}, other), ({"entropy": own}, own)):
        write(weights.with_suffix(".json"), {**record, **kept})
        pack_bundle("student", tmp_path / "packed.zip", plan, weights, evaluation=evaluation)
        files = contents(tmp_path / "packed.zip")
        assert json.loads(files["models/model.json"])["entropy"] == expected
        assert json.loads(files["configs/inference.json"])["familiar"] == familiar
        assert verify_archive(tmp_path / "packed.zip").fine


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_cards_are_true_in_a_packed_bundle(bundle: str, packed: dict[str, Path]) -> None:
    card = contents(packed[bundle])["docs/README.md"].decode()
    assert "bundles/" not in card
    assert "The configs' own values" not in card
    assert "--config_file configs/train.json" in card


def test_nothing_says_where_it_was_trained(packed: dict[str, Path], trained: dict[str, Path]) -> None:
    folder = str(trained["plan"].parent)
    for path in packed.values():
        for name, content in contents(path).items():
            assert folder.encode() not in content, name
            assert str(ROOT).encode() not in content, name
            assert b"tracking_uri" not in content or not name.startswith(("models", "configs/metadata")), name


def test_weights_are_tensors_alone_and_the_same(
    packed: dict[str, Path], trained: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(contents(packed["student"])["models/model.pt"])
    found, expected = read_weights(path), read_weights(trained["student"])
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


PLANS = {
    "a folder of this machine": ({"dataset_dir": "/home/doe/scans"}, r"configs/train\.json, dataset_dir: .*/home/doe"),
    "another root": ({"dataset_dir": "/groups/ct/scans"}, r"train\.json, dataset_dir: .*/groups/ct/scans"),
    "a path in an expression": ({"datalist": "$'/groups/ct' + '/a.json'"}, r"train\.json, datalist: .*/groups/ct"),
    "a folder of Windows": ({"dataset_dir": "D:\\scans\\ct"}, r"train\.json, dataset_dir: .*D:"),
    "a share": ({"dataset_dir": r"\\server\scans"}, r"train\.json, dataset_dir: .*server"),
    "a server": ({"tracking_uri": "http://tracking:5000"}, r"train\.json, tracking_uri: .*http://tracking:5000"),
    "a data base": ({"tracking_uri": "sqlite:////x/mlruns.db"}, r"train\.json, tracking_uri: .*sqlite"),
    "a list of cases": ({"training": [{"image": "a.nii.gz"}]}, r"train\.json, training: .*training data"),
    "an image file": ({"example": "images/scan.nii.gz"}, r"train\.json, example: .*scan\.nii\.gz"),
    "a patient": ({"PatientName": "Doe"}, r"train\.json, PatientName: .*'Doe'"),
    "a patient's number": ({"_comment": "without sub-0815"}, r"train\.json, _comment: .*sub-0815"),
    "a study": ({"_comment": "1.3.6.1.4.1.14519.5.2.1"}, r"train\.json, _comment: .*1\.3\.6"),
    "weights elsewhere": ({"ckpt_dir": "$@bundle_root + '/../student/models'"}, "ckpt_dir: an overlay sets it"),
    "another voxel size": (
        {"spacing": [1.0, 1.0, 2.0]},
        r"spacing: trained with \[1\.0, 1\.0, 1\.0\], found \[1\.0, 1",
    ),
    "another network": ({"features": [4, 8, 8, 4]}, r"network_def#features: trained with \[4, 8, 8, 8\], found"),
    "other classes": ({"labels": {"0": "background", "1": "wall", "2": "lumen"}}, "labels: trained with"),
    "another unit": (
        {"targets": [{"name": "thickness", "unit": "cm", "kind": "dense", "structure": 2, "scale": 2.0}]},
        "targets: trained with .*'mm'",
    ),
}


@pytest.mark.parametrize(("change", "message"), PLANS.values(), ids=PLANS)
def test_a_plan_that_is_refused(
    change: dict[str, Any], message: str, pack: Pack, tmp_path: Path, trained: dict[str, Path]
) -> None:
    plan = write(tmp_path / "changed.json", {**json.loads(trained["plan"].read_text()), **change})
    with pytest.raises(BadInput, match=message):
        pack(plan=plan)
    assert not (tmp_path / "packed.zip").exists()


def test_names_of_the_datalist_are_found_wherever_they_are(pack: Pack, tmp_path: Path) -> None:
    entry = {"image": "images/bulla7_left.nii.gz", "patient": "K2093"}
    datalist = write(tmp_path / "datalist.json", {"training": [entry]})
    pack(datalist=datalist)
    said = write(tmp_path / "said.json", {"data_source": "40 scans, K2093 left out"})
    with pytest.raises(
        BadInput, match=r"(?s)configs/metadata\.json, data_source: found 'K2093'.*docs/README\.md, line"
    ):
        pack(datalist=datalist, metadata=said)
    pack(metadata=said)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("MRN: 123456 was left out", "MRN: 123456"),
        ("some were left out; patient no. 4711 too", "patient no. 4711"),
        ("all but scan_mueller.nii.gz, as it was thin", "scan_mueller.nii.gz"),
    ],
)
def test_patients_are_found_in_what_a_user_says(text: str, found: str, pack: Pack, tmp_path: Path) -> None:
    said = write(tmp_path / "said.json", {"data_source": text})
    with pytest.raises(BadInput, match=rf"metadata\.json, data_source: found '{found}'.*\n.*README\.md, .*'{found}'"):
        pack(metadata=said)


def test_common_words_may_be_names_of_cases(trained: dict[str, Path], tmp_path: Path) -> None:
    """Names with a digit may stand in the bundle's own text alone, such as "v2" in "nnU-Net v2"."""
    cases = [{"image": f"images/{name}.nii.gz", "patient": "v2"} for name in ("lumen", "image", "hans", "1")]
    datalist = write(tmp_path / "datalist.json", {"training": cases})

    def remarks(text: str) -> str:
        said = write(tmp_path / "said.json", {"data_source": text})
        path = tmp_path / "packed.zip"
        given = {"metadata": said, "datalist": datalist}
        return "; ".join(pack_bundle("teacher", path, trained["plan"], trained["teacher"], **given)[1])

    assert "not looked for, being words of the classes or of the bundle's own texts: image, lumen;" in (
        remarks("Scans of the lumen, 1 image each") + ";"
    )
    for text, found in (("as v2 showed", "v2"), ("HANS was left out", "hans"), ("without case 1", "1")):
        with pytest.raises(BadInput, match=f"data_source: found '{found}'"):
            remarks(text)


def test_what_a_user_says_is_no_expression(pack: Pack, tmp_path: Path) -> None:
    said = write(tmp_path / "said.json", {"intended_use": "$1 a case"})
    with pytest.raises(BadInput, match=r"metadata, intended_use: .* would be run or looked up"):
        pack(metadata=said)


@pytest.mark.parametrize(
    ("orientation", "said"), [("RAS", "right, anterior, superior"), ("LPI", "left, posterior, inf")]
)
def test_the_orientation_is_said(
    orientation: str, said: str, train: Callable[..., Path], trained: dict[str, Path], pack: Pack, tmp_path: Path
) -> None:
    plan = write(tmp_path / "plan.json", {**json.loads(trained["plan"].read_text()), "orientation": orientation})
    files = contents(pack("teacher", plan=plan, weights=train("teacher", tmp_path, plan)))
    metadata = json.loads(files["configs/metadata.json"])
    assert metadata["network_data_format"]["inputs"]["image"]["orientation"] == orientation
    assert f"| axes | run to {said}" in files["docs/README.md"].decode()


OTHERS = {
    "bundle": ({"bundle": "techer"}, "'techer'.*dual_decoder, student, teacher"),
    "version": ({"version": "new"}, "version: found 'new'"),
    "no zip": ({"name": "packed.tar"}, r"packed\.tar.*\.zip"),
    "weights": ({"bundle": "teacher", "weights": "dual_decoder"}, "they don't fit this network"),
    "no weights": ({"weights": Path("none.pt")}, r"none\.pt: no such weights file"),
    "no plan": ({"plan": Path("none.json")}, r"none\.json: can't be read"),
    "what is filled in": ({"metadata": {"version": "2"}}, "metadata, version: is filled in"),
    "a study's figures": ({"evaluation": {**SUMMARY, "labels": {"liver": {}}}}, "labels: found liver.*lumen, wall"),
    "no summary": ({"evaluation": {"dice": 1}}, r"evaluation\.json: expected the summary\.json"),
}


@pytest.mark.parametrize(("arguments", "message"), OTHERS.values(), ids=OTHERS)
def test_other_input_that_is_refused(
    arguments: dict[str, Any], message: str, pack: Pack, tmp_path: Path, trained: dict[str, Path]
) -> None:
    given = {key: write(tmp_path / f"{key}.json", v) if isinstance(v, dict) else v for key, v in arguments.items()}
    if given.get("weights") == "dual_decoder":
        copy = tmp_path / "model.pt"  # without its record
        shutil.copyfile(trained["dual_decoder"], copy)
        given["weights"] = copy
    with pytest.raises(BadInput, match=message):
        pack(**given)
    assert not (tmp_path / "packed.zip").exists()


def test_a_packed_bundle_does_not_pack_itself(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.packing.pack.__package__", "scripts.common.packing")
    with pytest.raises(BadInput, match="is packed already"):
        pack()


def test_from_the_command_line(capsys: pytest.CaptureFixture[str], trained: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "teacher-0.3.0.zip"
    arguments = ["--plan", trained["plan"], "--weights", trained["teacher"], "--version", "0.3.0", "--output", path]
    assert main(["pack", "teacher", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert "returns: 0 background, 1 lumen, 2 wall" in printed
    assert "--metadata" in printed
    assert path.is_file()


def test_the_classes_of_a_teacher_of_one_organ() -> None:
    labels = {"0": "background", "1": "liver", "2": "spleen"}
    assert classes_of({"labels": labels, "organ": None}) == labels
    assert classes_of({"labels": labels, "organ": "spleen"}) == {"0": "background", "1": "spleen"}
    channels = output_channels({"labels": labels, "organ": "spleen"}, segments=True, channels=2)
    assert channels == {"0": "background", "1": "spleen"}
