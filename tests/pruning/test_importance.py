"""Selection averages per KV slot."""

from __future__ import annotations

import pytest
import torch

from fasa_sglang.pruning.importance import DECAY, START, Importance

CPU = torch.device("cpu")


def test_end_step_averages_each_tokens_share_of_the_selections() -> None:
    importance = Importance(9, CPU)
    slots = torch.tensor([4, 6, 2])
    importance.end_step(slots, 10)
    assert importance.average[2] == START, "the current token starts at the top"
    importance.count(torch.tensor([[4, 4, 6], [4, 2, 2]]))
    importance.end_step(torch.tensor([4, 6, 2, 8]), 10)
    assert importance.average[4] == pytest.approx((1 - DECAY) * 0.3)
    assert importance.average[6] == pytest.approx((1 - DECAY) * 0.1)
    assert importance.average[2] == pytest.approx(DECAY * START + (1 - DECAY) * 0.2)
    assert importance.counts.sum() == 0
    # A slot that is given to another token starts again.
    importance.end_step(torch.tensor([6, 4]), 10)
    assert importance.average[4] == START


def test_start_discards_what_former_owners_left_in_the_slots() -> None:
    """Counts of prompt tokens are never folded, so a slot may come with any count."""
    generator = torch.Generator().manual_seed(0)
    clean, stale = Importance(50, CPU), Importance(50, CPU)
    stale.average.uniform_(generator=generator)
    stale.counts.random_(0, 1000, generator=generator)
    slots = torch.randperm(49, generator=generator)[:20] + 1
    for importance in (clean, stale):
        importance.start(slots[:15])
        for length in range(16, 21):
            importance.count(slots[torch.arange(0, length, 3)])
            # The current token is always selected.
            importance.count(slots[length - 1])
            importance.end_step(slots[:length], 2)
    torch.testing.assert_close(stale.average[slots], clean.average[slots])
    assert stale.counts[slots].sum() == 0
