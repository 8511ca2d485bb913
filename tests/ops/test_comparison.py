"""Comparison selectors for a whole batch, against the reference lane by lane."""

from __future__ import annotations

import pytest
import torch

from fasa_sglang.config import SELECTORS
from fasa_sglang.ops import reference
from fasa_sglang.ops.comparison import best_positions, selector_scores

SEQ_LENS = [70, 5, 33, 17]
HQ, HKV, D, NUM_SLOTS = 6, 2, 8, 200


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(SEQ_LENS), HQ, D, generator=generator)
    k_cache = torch.randn(NUM_SLOTS, HKV, D, generator=generator)
    order = torch.randperm(NUM_SLOTS, generator=generator)
    slots = torch.full((len(SEQ_LENS), max(SEQ_LENS)), 10**6)
    for b, length in enumerate(SEQ_LENS):
        slots[b, :length] = order[sum(SEQ_LENS[:b]) :][:length]
    return q, k_cache, slots, torch.tensor(SEQ_LENS)


@pytest.mark.parametrize(
    ("budget", "sink", "recent"), [(16, 4, 3), (16, 0, 0), (1, 0, 0), (99, 4, 3)]
)
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_batch_selects_what_each_request_alone_would(
    selector: str, budget: int, sink: int, recent: int
) -> None:
    q, k_cache, slots, seq_lens = batch()
    seeds = [11, 12, 13, 14]
    head_dims = (torch.arange(HQ)[:, None] + torch.arange(D) % 4 < 4).float()
    inside = slots.masked_fill(slots == 10**6, 0)

    def scores(b: int | None) -> torch.Tensor:
        part = slice(None) if b is None else slice(b, b + 1)
        length = int(seq_lens[part].max())
        own = torch.randn(4, HKV, max(SEQ_LENS), generator=torch.Generator().manual_seed(7))
        past = torch.arange(max(SEQ_LENS)) >= seq_lens[:, None] - 1
        own = own.masked_fill(past[:, None], -torch.inf)
        return selector_scores(
            selector,
            q[part],
            k_cache,
            inside[part, :length],
            seq_lens[part],
            lambda: own[part, :, :length],
            head_dims,
            sm_scale=D**-0.5,
            combine="nrm",
            seeds=seeds[part],
        )

    together = best_positions(scores(None), seq_lens, budget=budget, sink=sink, recent=recent)
    assert together.shape == (4, HKV, min(budget, max(SEQ_LENS)))
    for b, length in enumerate(SEQ_LENS):
        alone, lens = reference.select_tokens(
            scores(b), seq_lens[b : b + 1], budget=budget, sink=sink, recent=recent
        )
        for h in range(HKV):
            kept = together[b, h, : min(budget, length)]
            assert sorted(kept.tolist()) == alone[0, h, : lens[0, h]].tolist()


def test_a_page_is_as_good_as_its_best_token() -> None:
    scores = torch.arange(40, dtype=torch.float32).repeat(1, 1, 1)
    scores[0, 0, 3], scores[0, 0, 38:] = 99, -torch.inf
    paged = reference.page_importance(scores)[0, 0]
    assert paged[:16].eq(99).all() and paged[16:32].eq(31).all() and paged[32:38].eq(37).all()
    assert paged[38:].eq(-torch.inf).all()
