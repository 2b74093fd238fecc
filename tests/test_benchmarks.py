"""The benchmarks run, and set against each other what they say they do. How fast anything is, is no test."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from bundle_runs import PLAN

from benchmarks import inference, large_volume, loading, plain_loop, start_up, training
from benchmarks.__main__ import SECTIONS, main
from common.data.phantom_set import generate_phantoms
from common.engines import trainer
from common.engines.compilation import compiled_networks


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps(PLAN))
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WARM_UP", 0)
    monkeypatch.setattr(training, "STEPS", 1)
    monkeypatch.setattr(loading, "BATCHES", 2)
    monkeypatch.setattr(loading, "STEPS", 2)


@pytest.mark.parametrize("name", training.rows())
def test_a_step_of_everything_that_is_trained(name: str, plan: str) -> None:
    found = training.measure(name, plan, "cpu")
    assert found["crop"] == [2, *PLAN["patch_size"]]
    assert found["seconds"] > 0
    assert found["flops"] > 0
    assert 0 < found["convolutions"] < 1
    if name == "dual_decoder":
        assert found["trained"] < found["parameters"], "encoder and segmentation decoder are locked"
    if name == "bcp":
        assert found["losses"]["consistency"] > 0, "it is past the part of the run without unlabelled crops"


def test_locked_parts_take_no_backward_pass(plan: str) -> None:
    locked, moving = (training.measure(name, plan, "cpu") for name in training.DUAL)
    assert locked["parameters"] == moving["parameters"] == moving["trained"]
    assert locked["flops"] < 0.7 * moving["flops"]


def test_rows_are_set_beside_supervised_training(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"supervised": 1.0, "ua_mt": 3.0}

    def measured(section: str, arguments: list[str]) -> dict[str, Any]:
        cost = costs[arguments[arguments.index("--one") + 1]]
        sizes = {"flops": 2e9 * cost, "trained": 5e6, "parameters": 5e6, "crop": [2, 8, 8, 8], "convolutions": 0.5}
        return {"seconds": 0.5 * cost, "bytes": cost * 2**20, **sizes}

    monkeypatch.setattr(training, "in_own_process", measured)
    monkeypatch.setattr(training, "matrix_rate", lambda dtype, device: 4e10)
    text = training.report(["supervised", "ua_mt"], None, "cpu")
    assert "2 labelled crops of 8 x 8 x 8" in text
    assert "| ua_mt | 1.500 | 3.00 | 3 | 3.00 | 6.0 | 10% | 50% | 5.00 |" in text


def test_every_variant_of_the_loop_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # The default backend compiles for minutes, and needs a compiler.
    monkeypatch.setattr(trainer, "compiled_networks", partial(compiled_networks, backend="eager"))
    size = plain_loop.SIZES["small"]
    small = plain_loop.Size(size.title, (2, 16, 16, 16), size.networks, 4)
    plain, *others = (plain_loop.measure(small, "network 16-128", name, "cpu") for name in plain_loop.VARIANTS)
    assert plain["losses"][-1] < plain["losses"][0]
    for found in others:
        assert found["losses"] == pytest.approx(plain["losses"], abs=0.02)
        assert found["flops"] == plain["flops"]


@pytest.mark.parametrize("title", inference.TABLES)
def test_rows_of_inference(title: str) -> None:
    for row in inference.TABLES[title].values():
        windows = {**row.windows, "roi_size": (32, 32, 32)}
        small = inference.Row(row.networks, (32, 32, 40), windows)
        found = inference.measure(small, small, "cpu")
        assert min(found["seconds"], *found["ratios"], found["parameters"]) > 0


def test_a_scan_from_its_file_to_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_volume, "ROWS", {"small": ("dual_decoder", (40, 40, 32), (0.8, 0.8, 0.6))})
    monkeypatch.setattr(large_volume, "WINDOW", [32, 32, 32])
    monkeypatch.setattr(
        large_volume, "in_own_process", lambda section, arguments: large_volume.measure(arguments[1], "cpu")
    )
    text = large_volume.main(argparse.Namespace(one=None, device="cpu"))
    [row] = [line for line in text.splitlines() if line.startswith("| small | 40 x 40 x 32 | 0.8 x 0.8 x 0.6 | ")]
    memory = float(row.split("|")[5])
    assert 0.2 < memory < 4, "of the libraries, above all"


def test_a_scan_has_air_tissue_and_lungs(tmp_path: Path) -> None:
    large_volume.make_scan((64, 64, 8), (0.8, 0.8, 0.6), tmp_path / "scan.nii")
    scan = nibabel.load(tmp_path / "scan.nii")
    assert scan.header.get_zooms() == pytest.approx((0.8, 0.8, 0.6))
    means = [scan.get_fdata()[place].mean() for place in (np.s_[:4, :4], np.s_[32, 32], np.s_[44:46, 32])]
    assert means == pytest.approx([-1000, 40, -850], abs=10)


def test_loading_from_files_and_from_the_cache(tmp_path: Path, plan: str) -> None:
    phantoms = tmp_path / "phantoms"
    generate_phantoms(phantoms, labeled=2, unlabeled=0, validation=0, shape=(24, 24, 20), seed=1, progress=False)
    for variant in ("from files", "cached"):
        found = loading.measure(variant, str(phantoms), "datalist.json", plan, "cpu")
        assert found["first"] > 0
        assert found["seconds"] > 0
    assert loading.measure_step(str(phantoms), "datalist.json", plan, "cpu")["seconds"] > 0


def test_start_up_runs_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(start_up, "fastest", lambda call, device: call() or 2.0)
    main(["start_up"])
    assert "| python -m monai.bundle run, doing nothing | 2.0 | 1.00 |" in capsys.readouterr().out


def test_sections_that_compute_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dodnet", "dynamic_convolution"):
        assert name in SECTIONS
        main([name])
        text = capsys.readouterr().out
        assert text.count("\n") >= 5
    assert "| bundles' default | 16 32 64 128 | 32 x 32 x 32 | 1.40 M | 0.23 M | 84% |" in text
    assert "| 9.45 M | 1.36 M |" in text, "the literature's V-Net"


def test_a_section_that_fails_keeps_none_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: argparse.Namespace) -> str:
        raise SystemExit("no memory")

    monkeypatch.setattr("benchmarks.__main__.SECTIONS", ("training", "dodnet"))
    monkeypatch.setattr(training, "main", fail)
    with pytest.raises(SystemExit, match="failed: training"):
        main(["all", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "no memory" in text
    assert "| " in text.split("## Dodnet")[1]
