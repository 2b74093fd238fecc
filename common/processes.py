"""The processes of a distributed run: which one this is, and what all of them have."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

__all__ = ["gathered", "process_share"]

Item = TypeVar("Item")


def process_share() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(item: Item) -> list[Item]:
    """What all processes have, by rank; they have to call this together. Of a single process its own."""
    _, processes = process_share()
    items = [item] * processes
    if processes > 1:
        dist.all_gather_object(items, item)
    return items
