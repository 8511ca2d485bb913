"""Which generated tokens lose their KV slots, and when.

A pruned token leaves a tombstone: its entry of ``req_to_token`` becomes 0, a slot that is never
allocated. Lengths and positions stay as they were, so that everything in SGLang that counts tokens
goes on counting; attention reads what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fasa_sglang.config import FasaConfig
from fasa_sglang.pruning.importance import Importance
from fasa_sglang.requests import FasaRequest


@dataclass
class PruneState:
    """What was pruned of a running request since its last prefill.

    Args:
        pruned: Tombstones.
        total: The same, over all its prefills; what its reply reports.
        live: Generated tokens that have a slot, as the metrics know them.
    """

    pruned: int = 0
    total: int = 0
    live: int = 0


def prunable_range(
    request: FasaRequest,
    config: FasaConfig,
    *,
    prompt_len: int,
    protected_len: int,
    seq_len: int,
    think_end: int | None,
) -> tuple[int, int]:
    """Positions that may be pruned now; empty if the end is not behind the start.

    Args:
        request: What was asked.
        config: The server's settings.
        prompt_len: Tokens of the prompt.
        protected_len: Leading tokens that the radix tree owns. After a retraction generated ones
            are among them.
        seq_len: Tokens of the request.
        think_end: Where its thinking ends; None if it has not ended, or nobody knows.
    """
    start = max(prompt_len, protected_len, request.sink)
    end = seq_len - max(config.prune_recent, config.prune_grace, request.recent)
    if request.prune == "think" and think_end is not None:
        end = min(end, think_end)
    return start, end


def num_victims(
    request: FasaRequest,
    config: FasaConfig,
    *,
    pruned: int,
    start: int,
    end: int,
    seq_len: int,
    think_end: int | None,
) -> int:
    """How many tokens to prune now, so that ``prune_budget`` of those that count are left.

    Nothing is pruned until ``prune_interval`` are too many.

    Args:
        request: What was asked.
        config: The server's settings.
        pruned: Tombstones, all of them between ``start`` and ``end``.
        start: Of the prunable range.
        end: Of the prunable range.
        seq_len: Tokens of the request.
        think_end: As for ``prunable_range``.
    """
    counted = seq_len
    if request.prune == "think" and think_end is not None:
        counted = min(seq_len, think_end)
    excess = counted - start - pruned - request.prune_budget
    if excess < config.prune_interval:
        return 0
    return max(0, min(excess, end - start - pruned))


def choose_victims(
    importance: Importance, slots: torch.Tensor, count: int, rule: str, seed: int
) -> torch.Tensor:
    """The tokens to prune, without a synchronisation.

    Args:
        importance: Of all slots.
        slots: Of the prunable tokens, in order, ``[N]``, int; 0 where one is a tombstone.
        count: How many; there are as many live ones.
        rule: ``fasa`` takes the least wanted, ``oldest`` the first, ``random`` any.
        seed: Of ``random``.

    Returns:
        Indices into ``slots``, ``[count]``, int64.
    """
    if rule == "fasa":
        worth = importance.average[slots]
    elif rule == "oldest":
        worth = torch.arange(len(slots), dtype=torch.float32, device=slots.device)
    else:
        generator = torch.Generator().manual_seed(seed)
        worth = torch.rand(len(slots), generator=generator).to(slots.device)
    return worth.masked_fill(slots == 0, torch.inf).topk(count, largest=False).indices


def prune_row(row: torch.Tensor, start: int, victims: torch.Tensor, allocator: Any) -> None:
    """Give the victims' slots back and leave tombstones.

    Args:
        row: The request's row of ``req_to_token``.
        start: Position that ``victims`` count from.
        victims: ``[count]``, int64.
        allocator: SGLang's; takes slots.
    """
    places = start + victims
    # A copy: inside a free group SGLang keeps what it is given, and the row is about to change.
    allocator.free(row[places].to(torch.int64))
    row[places] = 0


def live_slots(row: torch.Tensor, count: int) -> torch.Tensor:
    """The slots in a part of a row that are no tombstones, in no order, without a synchronisation.

    Args:
        row: Part of a row of ``req_to_token``.
        count: How many live ones there are.
    """
    return row.sort(descending=True).values[:count]
