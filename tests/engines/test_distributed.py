from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.engines import distributed_device, start_distributed, stop_distributed
from common.errors import BadInput

TWO_PROCESSES = """
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from ignite.engine import Events
from common.engines import SemiSupervisedTrainer, distributed_device, start_distributed, stop_distributed
from common.errors import BadInput
from common.handlers import Checkpoint
from common.methods import Method
from common.methods.moving_average import MovingAverage


class Line(Method):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.0))
        self.norm = torch.nn.BatchNorm1d(1, affine=False)
        self.average = MovingAverage(self.norm)

    def forward(self, batch, optimizer=""):
        self.norm(batch["labeled"]["label"] * torch.tensor([[1.0], [3.0]]))
        error = (self.weight * batch["labeled"]["image"] - batch["labeled"]["label"]).square().mean()
        known = torch.tensor(math.nan if dist.get_rank() == 0 else 0.25)
        return {"loss": error, "kept/wall": known, "kept/none": known * math.nan}

    def after_step(self):
        self.average.update_parameters(self.norm)


class Validation:
    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.look)

    def look(self, engine):
        self.statistics = [norm.running_mean.item() for norm in (engine.method.norm, engine.method.average.module)]


start_distributed()
rank = dist.get_rank()
batch = {"labeled": {"image": torch.tensor([1.0]), "label": torch.tensor([2.0 + 4.0 * rank])}}
method = Line()
optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
validation = Validation()
trainer = SemiSupervisedTrainer(
    "cpu", 1, [batch], method, optimizer, amp=False, gradient_clip=None, train_handlers=[validation]
)
trainer.run()
with open(f"statistics_{rank}.json", "w") as file:
    json.dump(validation.statistics, file)
with open(f"{rank}.txt", "w") as file:
    file.write(f"{distributed_device()} {method.weight.item():.6f} {torch.rand(()).item():.6f}")
with open(f"{rank}.json", "w") as file:
    json.dump(trainer.state.metrics, file)
for run in ("begun", "resumed"):
    checkpoint = Checkpoint({"method": method}, method, f"disk_of_{rank}", f"disk_of_{rank}/model.pt", resume=True)
    try:
        SemiSupervisedTrainer("cpu", 1, [batch], method, optimizer, amp=False, train_handlers=[checkpoint]).run()
    except BadInput as error:
        Path(f"refused_when_{run}_{rank}.txt").write_text(str(error))
stop_distributed()
stop_distributed()
assert not dist.is_initialized()
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert "pt_gloo_runloop" not in threads, threads  # one that outlives the interpreter aborts the process
"""


def test_without_torchrun_the_message_says_how_and_no_more(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(BadInput, match="torchrun --standalone") as caught:
        start_distributed()
    sys.excepthook(caught.type, caught.value, caught.tb)
    shown = capsys.readouterr().err
    assert "error: multi_gpu_train.json" in shown
    assert "Traceback" not in shown
    stop_distributed()  # nothing to leave


def test_device_of_a_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed_device() == "cuda:3"
    monkeypatch.delenv("LOCAL_RANK")
    assert distributed_device() == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed_device() == "cpu"


def test_two_processes_take_one_step_together(tmp_path):
    """Targets 2 and 6 at an image of 1: the mean gradient is -8, so both weights become 0.8; their seeds differ.

    Losses 4 and 36 are logged as 20, a term that one of them has as that one's.
    """
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    results = [(tmp_path / f"{rank}.txt").read_text().split() for rank in (0, 1)]
    assert [result[:2] for result in results] == [["cpu", "0.800000"]] * 2
    assert results[0][2] != results[1][2], "dropout and augmentation are not the same in every process"
    expected = {"train/loss": 20.0, "train/kept/wall": 0.25, "train/learning_rate": 0.1}
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
        # Each validates what the first one saves: its norm has seen 2 and 6, a tenth of whose mean is 0.4.
        assert json.loads((tmp_path / f"statistics_{rank}.json").read_text()) == pytest.approx([0.4, 0.4])
    # Of two machines with disks of their own the first alone has a checkpoint, so both begin, and don't both resume.
    assert [path.name for path in tmp_path.glob("refused*")] == ["refused_when_resumed_1.txt"]
    assert (
        "output_dir on a disk that all machines of the run share"
        in (tmp_path / "refused_when_resumed_1.txt").read_text()
    )
