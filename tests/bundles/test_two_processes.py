"""Training under torchrun: what several processes do together is what one does with their batches in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from bundle_runs import SHORT, config, run

# A thread that outlives the interpreter aborts a process that has done its work.
COUNT_THREADS = """$print('threads left:', [path.read_text().strip() for path in
__import__('pathlib').Path('/proc/self/task').glob('*/comm')].count('pt_gloo_runloop'))"""


def metrics(folder: Path) -> dict[str, list[float]]:
    """Every figure of the one run that MLflow knows, epoch by epoch."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("teacher").experiment_id])
    history = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
    return {key: [value.value for value in sorted(values, key=lambda v: v.step)] for key, values in history.items()}


def test_two_processes_take_the_steps_of_one_with_their_batches_together(
    phantoms: Path, plan: Path, workflow: Callable[..., None], tmp_path: Path
) -> None:
    """So gradients are averaged, crops are shared out, and each case of the validation counts as much as any other."""
    # By default the Dice is pooled over a process's own crops, which is no mean over crops.
    overlay = tmp_path / "mean_of_crops.json"
    loss = {"_target_": "common.losses.SegmentationLoss", "batch_dice": False}
    overlay.write_text(json.dumps({"train#method#segmentation_loss": loss}))

    def places(name: str) -> dict[str, Any]:
        folder = str(tmp_path / name)
        return {"dataset_dir": str(phantoms), "output_dir": folder, "ckpt_dir": folder}

    workflow("teacher", str(overlay), **places("one"), batch_size=2)
    files = [config("teacher", "train.json"), config("teacher", "multi_gpu_train.json"), str(overlay), str(plan)]
    threads = tmp_path / "threads.json"
    threads.write_text(json.dumps({"+finalize": [COUNT_THREADS]}))
    files.append(str(threads))
    done = run(files, {**SHORT, **places("two"), "batch_size": 1}, processes=2)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-5000:]

    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True)["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    expected, found = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert {"train/loss", "val_mean_dice"} <= set(expected) == set(found)
    for key, values in expected.items():
        assert len(values) == 2, key
        assert found[key] == pytest.approx(values, rel=1e-4), key
    assert printed.count("threads left: 0") == 2
    # The first of them speaks and writes for both.
    for line in ("Epoch 1/2:", "Epoch 2/2:", "Weights to use:"):
        assert printed.count(line) == 1, line
