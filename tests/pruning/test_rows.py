"""Tombstones in a row of ``req_to_token``."""

from __future__ import annotations

import pytest
import torch

from fasa_sglang.pruning.importance import Importance
from fasa_sglang.pruning.policy import choose_victims
from fasa_sglang.pruning.rows import live_slots, prune_row


class Allocator:
    """Refuses to free a slot twice, like SGLang's leak check."""

    def __init__(self) -> None:
        self.freed: set[int] = set()

    def free(self, slots: torch.Tensor) -> None:
        assert slots.dtype == torch.int64
        for slot in slots.tolist():
            assert slot > 0 and slot not in self.freed
            self.freed.add(slot)


@pytest.mark.parametrize("rule", ["fasa", "oldest", "random"])
def test_prune_row_and_live_slots_free_every_slot_once(rule: str) -> None:
    torch.manual_seed(0)
    row = (torch.randperm(99) + 1).int()
    all_slots = set(row.tolist())
    importance = Importance(100, torch.device("cpu"))
    allocator, pruned = Allocator(), 0
    for end in (40, 60, 85):
        victims = choose_victims(importance, row[10:end].long(), 9, rule, end)
        prune_row(row, 10, victims, allocator)
        pruned += 9
        assert int((row == 0).sum()) == pruned == len(allocator.freed)
    assert (row[:10] > 0).all() and (row[85:] > 0).all()
    allocator.free(live_slots(row, len(row) - pruned).long())
    assert allocator.freed == all_slots
