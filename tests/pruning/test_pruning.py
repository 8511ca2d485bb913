"""Who is pruned, when, and what stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasa_sglang.config import FasaConfig
from fasa_sglang.pruning.importance import DECAY, Importance
from fasa_sglang.pruning.policy import (
    choose_victims,
    live_slots,
    num_victims,
    prunable_range,
    prune_row,
)
from fasa_sglang.requests import FasaRequest

CONFIG = FasaConfig(prune_interval=8, prune_recent=10, prune_grace=4)
REQUEST = FasaRequest(64, 4, 2, prune="generated", prune_budget=30)


def asked_range(request: FasaRequest = REQUEST, **changes: Any) -> tuple[int, int]:
    values: dict[str, Any] = {"prompt_len": 50, "protected_len": 50, "seq_len": 100}
    return prunable_range(request, CONFIG, **{**values, "think_end": None, **changes})


def asked_victims(seq_len: int, pruned: int = 0, think_end: int | None = None) -> int:
    request = FasaRequest(64, 4, 2, prune="think" if think_end else "generated", prune_budget=30)
    start, end = asked_range(request, seq_len=seq_len, think_end=think_end)
    return num_victims(
        request,
        CONFIG,
        pruned=pruned,
        start=start,
        end=end,
        seq_len=seq_len,
        think_end=think_end,
    )


class Allocator:
    """Takes slots and refuses to take one twice, as SGLang's idle check would."""

    def __init__(self) -> None:
        self.freed: set[int] = set()

    def free(self, slots: torch.Tensor) -> None:
        assert slots.dtype == torch.int64
        for slot in slots.tolist():
            assert slot > 0 and slot not in self.freed
            self.freed.add(slot)


def test_prompt_sink_recent_and_what_the_tree_owns_are_safe() -> None:
    assert asked_range() == (50, 90)
    assert asked_range(prompt_len=2, protected_len=0) == (4, 90)
    # After a retraction generated tokens were prefilled and are in the tree.
    assert asked_range(protected_len=80) == (80, 90)
    # The request's own recent tokens, if they are more, and judged ones only.
    assert asked_range(FasaRequest(64, 4, 20, prune="generated")) == (50, 80)
    thinking = FasaRequest(64, 4, 2, prune="think")
    assert asked_range(thinking) == (50, 90)
    assert asked_range(thinking, think_end=70) == (50, 70)


def test_nothing_happens_until_an_interval_is_too_much() -> None:
    assert [asked_victims(50 + generated) for generated in (10, 30, 37)] == [0, 0, 0]
    assert asked_victims(50 + 38) == 8
    assert asked_victims(50 + 38 + 7, pruned=8) == 0
    assert asked_victims(50 + 38 + 8, pruned=8) == 8
    # The answer does not count towards the budget of the thoughts.
    assert asked_victims(200, think_end=85) == 0
    assert asked_victims(200, think_end=90) == 10


def test_the_least_wanted_go_and_a_tombstone_never_goes_twice() -> None:
    importance = Importance(20, torch.device("cpu"))
    importance.average[:] = torch.arange(20) / 20
    slots = torch.tensor([7, 0, 3, 12, 0, 5])
    victims = choose_victims(importance, slots, 2, "fasa", 0)
    assert sorted(slots[victims].tolist()) == [3, 5]
    assert sorted(choose_victims(importance, slots, 3, "oldest", 0).tolist()) == [0, 2, 3]
    for seed in range(20):
        chance = slots[choose_victims(importance, slots, 4, "random", seed)]
        assert sorted(chance.tolist()) == [3, 5, 7, 12]


@pytest.mark.parametrize("rule", ["fasa", "oldest", "random"])
def test_every_slot_is_given_back_exactly_once(rule: str) -> None:
    torch.manual_seed(0)
    row = (torch.randperm(99) + 1).int()
    everything = set(row.tolist())
    importance = Importance(100, torch.device("cpu"))
    allocator, pruned = Allocator(), 0
    for end in (40, 60, 85):
        victims = choose_victims(importance, row[10:end].long(), 9, rule, end)
        prune_row(row, 10, victims, allocator)
        pruned += 9
        assert int((row == 0).sum()) == pruned == len(allocator.freed)
    assert (row[:10] > 0).all() and (row[85:] > 0).all()
    allocator.free(live_slots(row, len(row) - pruned).long())
    assert allocator.freed == everything


def test_a_token_is_worth_what_selection_made_of_it() -> None:
    importance = Importance(9, torch.device("cpu"))
    slots = torch.tensor([4, 6, 2])
    importance.end_step(slots, 10)
    assert importance.average[2] == 1.0, "the current token starts on top"
    importance.count(torch.tensor([[4, 4, 6], [4, 2, 2]]))
    importance.end_step(torch.tensor([4, 6, 2, 8]), 10)
    assert importance.average[4] == pytest.approx((1 - DECAY) * 0.3)
    assert importance.average[6] == pytest.approx((1 - DECAY) * 0.1)
    assert importance.average[2] == pytest.approx(DECAY + (1 - DECAY) * 0.2)
    assert importance.counts.sum() == 0
    # A slot that another token gets begins anew.
    importance.end_step(torch.tensor([6, 4]), 10)
    assert importance.average[4] == 1.0
