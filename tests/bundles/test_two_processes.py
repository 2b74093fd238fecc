"""Training under torchrun: what several processes do together is what one does with their batches in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from bundle_runs import ROOT, SHORT, Chain, config, recipe_files, run
from recipe_steps import train_alone

from benchmarks.training import rows
from common.data import generate_phantoms

# Which cases a process has prepared for its validation.
NAME_PREPARED = (
    """$print('prepared:', [number for number, case in enumerate(@validate#dataset._cache) if case is not None])"""
)
# A thread that outlives the interpreter aborts a process that has done its work.
COUNT_THREADS = """$print('threads left:', [path.read_text().strip() for path in
__import__('pathlib').Path('/proc/self/task').glob('*/comm')].count('pt_gloo_runloop'))"""


def metrics(folder: Path, stage: str) -> dict[str, list[float]]:
    """Every figure of the one run that MLflow knows, epoch by epoch."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name(stage).experiment_id])
    history = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
    return {key: [value.value for value in sorted(values, key=lambda v: v.step)] for key, values in history.items()}


@pytest.fixture(scope="module")
def three_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms with a validation that two processes can't halve."""
    folder = tmp_path_factory.mktemp("three_cases") / "data"
    generate_phantoms(folder, labeled=2, unlabeled=2, validation=3, shape=(24, 24, 20), seed=1, progress=False)
    return folder


@pytest.fixture
def exact(tmp_path: Path) -> str:
    overlay = tmp_path / "exact.json"
    overlay.write_text(json.dumps({"+train#handlers": [{"_target_": "bundle_runs.DoublePrecision"}]}))
    return str(overlay)


def validated(folder: Path) -> list[dict[str, float]]:
    """Mean, spread and number of the cases' entropies of each validation, from the run's record."""
    return list(json.loads((folder / "run.json").read_text())["validated"].values())


def assert_same_weights(folder: Path, expected: Path) -> None:
    """As they are where both were trained in float64, of which a loss keeps float32."""
    found, weights = (torch.load(path / "model.pt", weights_only=True)["model"] for path in (folder, expected))
    for name, value in weights.items():
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(found[name], value, atol=1e-7, rtol=0, msg=message)


def places(data: Path, folder: Path) -> dict[str, str]:
    """Where a training finds its cases, and leaves all that it writes."""
    return {"dataset_dir": str(data), "output_dir": str(folder), "ckpt_dir": str(folder)}


@pytest.mark.parametrize("bundle", ["teacher", "dual_decoder"])
def test_two_processes_take_the_steps_of_one_with_their_batches_together(
    bundle: str, three_cases: Path, chain: Chain, exact: str, workflow: Callable[..., None], tmp_path: Path
) -> None:
    """So gradients are averaged, crops are shared out, and so are the cases of the validation, each of which counts as
    much as any other."""
    settings = {key: value for key, value in chain.settings(bundle).items() if key.endswith("_path")}
    threads = tmp_path / "threads.json"
    threads.write_text(json.dumps({"+finalize": [NAME_PREPARED, COUNT_THREADS]}))
    workflow(bundle, exact, **settings, **places(three_cases, tmp_path / "one"), batch_size=2)
    overlays = [config(bundle, "multi_gpu_train.json"), exact, str(threads), str(chain.plan)]
    files = [config(bundle, "train.json"), *overlays]
    done = run(files, {**SHORT, **settings, **places(three_cases, tmp_path / "two"), "batch_size": 1}, processes=2)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-5000:]

    assert_same_weights(tmp_path / "two", tmp_path / "one")
    expected, found = (metrics(tmp_path / name, bundle) for name in ("one", "two"))
    assert {"train/loss", "val_mean_dice"} <= set(expected) == set(found)
    for key, values in expected.items():
        assert len(values) == 2, key
        assert found[key] == pytest.approx(values, rel=1e-4), key
    for expected_entropy, entropy in zip(validated(tmp_path / "one"), validated(tmp_path / "two"), strict=True):
        assert expected_entropy["n"] == 3
        assert entropy == pytest.approx(expected_entropy, rel=1e-4)
    for prepared in ("[0, 2]", "[1]"):
        assert printed.count(f"prepared: {prepared}") == 1, printed[-3000:]
    assert printed.count("threads left: 0") == 2
    # The first of them speaks and writes for both.
    for line in ("Epoch 1/2:", "Epoch 2/2:", "Weights to use:"):
        assert printed.count(line) == 1, line


@pytest.mark.parametrize("recipe", ["distillation", "ase_net"])
def test_a_run_is_resumed_with_another_number_of_processes(
    recipe: str, chain: Chain, exact: str, workflow: Callable[..., None], tmp_path: Path
) -> None:
    """Begun with one process and ended with two, with one optimiser or two, it arrives where one process arrives.

    But for ASE-Net's noise, which each process draws for itself; so would distillation its boxes.
    """
    settings: dict[str, Any] = {"teacher_path": str(chain.model("teacher")), "mix_probability": 0.0}
    overlays = [exact]
    if recipe == "ase_net":
        settings, overlays = {}, [*recipe_files(recipe), exact]
    crash = tmp_path / "crash.json"
    crash.write_text(json.dumps({"+train#handlers": [{"_target_": "bundle_runs.Crash", "after_iteration": 3}]}))
    with pytest.raises(RuntimeError):  # in the second of two epochs
        workflow("student", *overlays, str(crash), **settings, **places(chain.data, tmp_path / "both"), batch_size=2)
    assert not (tmp_path / "both" / "model.pt").exists()

    files = [config("student", "train.json"), *overlays, config("student", "multi_gpu_train.json"), str(chain.plan)]
    resumed = {**SHORT, **settings, **places(chain.data, tmp_path / "both"), "batch_size": 1, "resume": True}
    done = run(files, resumed, processes=2)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-5000:]
    assert printed.count("Epoch 2/2:") == printed.count("Weights to use:") == 1
    assert "Epoch 1/2:" not in printed
    if recipe == "ase_net":
        saved = torch.load(tmp_path / "both" / "checkpoint.pt", weights_only=True)
        assert (saved["epoch"], saved["iteration"]) == (2, 4)
        steps = [moments["step"] for moments in saved["state"]["optimizer"]["state"].values()]
        assert set(map(int, steps)) == {4}
        assert all(value.isfinite().all() for value in saved["state"]["method"].values())
        return
    workflow("student", *overlays, **settings, **places(chain.data, tmp_path / "one"), batch_size=2)
    assert_same_weights(tmp_path / "both", tmp_path / "one")


@pytest.fixture(scope="module")
def steps_of_two(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is trained took some steps in two processes."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("recipe_steps.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *torchrun, str(script), str(folder), str(plan), *rows()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.parametrize("name", rows())
def test_two_processes_take_the_step_of_one_with_both_batches_in_one(
    name: str, steps_of_two: Path, plan: Path, tmp_path: Path
) -> None:
    """With several optimisers, moving averages, frozen teachers, masks and Dice over a batch.

    Not what each process draws for itself: here all draw the same. The V-Net's batch norm is in none of these networks.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = train_alone(name, tmp_path, str(plan))
    finally:
        torch.set_num_threads(threads)
    first, second = (torch.load(steps_of_two / name / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() == expected.keys()
    for key, value in expected.items():
        message = lambda text, key=key: f"{key}: {text}"  # noqa: E731
        torch.testing.assert_close(first[key], value, atol=1e-7, rtol=0, msg=message)
        if value.is_floating_point() and "weight" in key:
            assert torch.equal(first[key], second[key]), key
