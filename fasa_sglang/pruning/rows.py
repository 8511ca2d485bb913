"""Tombstones in a request's row of SGLang's ``req_to_token`` table.

The entry of a pruned token becomes 0, a slot that is never allocated. Lengths and positions do not
change, so everything in SGLang that counts tokens remains right; attention reads the other entries.
"""

from __future__ import annotations

from typing import Any

import torch


def prune_row(row: torch.Tensor, start: int, victims: torch.Tensor, allocator: Any) -> None:
    """Free the victims' slots and leave tombstones.

    Args:
        row: The request's row of ``req_to_token``, int32.
        start: Position that ``victims`` are relative to.
        victims: Positions to prune, ``[N]``, int64.
        allocator: SGLang's slot allocator.
    """
    positions = start + victims
    # A copy: within a free group SGLang keeps the tensor itself, and the row is about to change.
    allocator.free(row[positions].to(torch.int64))
    row[positions] = 0


def live_slots(row: torch.Tensor, count: int) -> torch.Tensor:
    """Slots without the tombstones, in no particular order. Does not synchronise.

    Args:
        row: Part of a row of ``req_to_token``, int32.
        count: Entries that are not tombstones.

    Returns:
        ``[count]``, int32.
    """
    return row.sort(descending=True).values[:count]
