"""What the processes of one server tell each other at start."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from sglang.srt.distributed.parallel_state import get_world_group


def gather(value: Any) -> list[Any]:
    """The values of all ranks of this server, in the order of the ranks, on every rank.

    Args:
        value: This rank's value; picklable, on the CPU.
    """
    group = get_world_group()
    if group.world_size == 1:
        return [value]
    values: list[Any] = [None] * group.world_size
    dist.all_gather_object(values, value, group=group.cpu_group)
    return values
