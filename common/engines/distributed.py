"""Processes that ``torchrun`` started, one a device."""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist

from ..errors import BadInput, report_plainly

__all__ = ["distributed_device", "start_distributed", "stop_distributed"]


def distributed_device() -> str:
    """The device of this process: the GPU of its local rank, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def start_distributed() -> None:
    """Join the process group: NCCL with GPUs, Gloo without.

    Raises:
        BadInput: when the process was not started by torchrun.
    """
    report_plainly()  # the first thing that such a run does
    if "LOCAL_RANK" not in os.environ:
        raise BadInput(
            "multi_gpu_train.json was run in a process of its own; torchrun starts one a GPU. Run: torchrun "
            "--standalone --nproc_per_node=GPUS -m monai.bundle run --config_file \"['CONFIGS/train.json',"
            "'CONFIGS/multi_gpu_train.json']\", or leave multi_gpu_train.json out for one device."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed_device())
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop_distributed() -> None:
    """Leave the process group, together, and end its threads.

    A thread of Gloo that lets go of its last tensor while the interpreter ends would abort the process, its work done.
    The threads end with the group, once nobody holds it.
    """
    if dist.is_initialized():
        dist.barrier()  # nobody takes the group from under another who still talks
        gc.collect()
        dist.destroy_process_group()
