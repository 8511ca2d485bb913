"""Kernels of pruning against their references."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DEVICE,
    Case,
    check_selection,
    make_case,
    needs_triton,
    scored,
    written_labels,
)

from fasa_sglang.ops.label_format import LABEL_FORMATS
from fasa_sglang.pruning.importance import DECAY, START, Importance

pytestmark = needs_triton


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("seq_lens", [(1,), (5, 3000, 40), (1024, 1025, 2048, 7)])
def test_close_gaps_with_and_without_tombstones_moves_live_slots_to_the_front(
    seq_lens: tuple[int, ...],
) -> None:
    from fasa_sglang.ops.tombstones import close_gaps

    generator = torch.Generator().manual_seed(0)
    lanes = [torch.randint(1, 10**6, (n,), generator=generator).int() for n in seq_lens]
    # The last lane claims to have no tombstones, so its zeros are not looked at.
    for lane in lanes[:-1]:
        lane[torch.rand(len(lane), generator=generator) < 0.7] = 0
    lanes[-1][::2] = 0
    pruned = [int((lane == 0).sum()) for lane in lanes[:-1]] + [0]
    slots = torch.cat(lanes).to(DEVICE)
    indptr = torch.tensor([0, *torch.tensor(seq_lens).cumsum(0)], dtype=torch.int32, device=DEVICE)
    close_gaps(slots, indptr, torch.tensor(pruned, dtype=torch.int32, device=DEVICE))
    parts = slots.cpu().split(list(seq_lens))
    for lane, part in zip(lanes[:-1], parts, strict=False):
        live = lane[lane != 0]
        assert torch.equal(part[: len(live)], live)
    assert torch.equal(parts[-1], lanes[-1])


def test_update_averages_over_stale_slots_matches_the_reference() -> None:
    """Two steps after the averages began; one lane does not count, and some slots are free."""
    from fasa_sglang.ops.selection_average import update_averages

    generator = torch.Generator().manual_seed(0)
    live_lens, prompt_lens, counted = [700, 3, 2000, 600], [60, 2, 0, 10], [1, 1, 1, 0]
    num_slots, selectors = 4000, 12
    slots = (torch.randperm(num_slots - 1, generator=generator) + 1)[: sum(live_lens)].int()
    indptr = [0, *torch.tensor(live_lens).cumsum(0).tolist()]
    generated = [
        slots[begin + prompt_len : end].long()
        for begin, prompt_len, end in zip(indptr, prompt_lens, indptr[1:], strict=False)
    ]
    reference = Importance(num_slots, torch.device("cpu"))
    kernel = Importance(num_slots, torch.device(DEVICE))
    # Former owners of the slots left averages, and counts of tokens that have no average.
    reference.average.uniform_(generator=generator)
    reference.counts.random_(0, 1000, generator=generator)
    kernel.average.copy_(reference.average)
    kernel.counts.copy_(reference.counts)
    for lane_slots, counts in zip(generated, counted, strict=True):
        if counts:
            reference.start(lane_slots[:-1])
            kernel.start(lane_slots[:-1].to(DEVICE))

    for _ in range(2):
        selected = torch.randint(0, selectors, (num_slots,), generator=generator).int()
        reference.counts += selected
        kernel.counts += selected.to(DEVICE)
        for lane_slots, counts in zip(generated, counted, strict=True):
            if counts:
                reference.end_step(lane_slots, selectors)
        update_averages(
            slots.to(DEVICE),
            ints(indptr),
            ints(prompt_lens),
            ints(live_lens),
            ints(counted),
            kernel.counts,
            kernel.average,
            selectors,
            DECAY,
        )
        torch.testing.assert_close(kernel.average.cpu(), reference.average)
        assert torch.equal(kernel.counts.cpu(), reference.counts)
    first = generated[0]
    assert (kernel.average.cpu()[first] <= START).all(), "a stale count was folded"


def count_selections(case: Case, buffers, budgets: list[int], counted: list[int], forced):
    """Select tokens, check the counts against the returned indices, and return these."""
    from fasa_sglang.ops.token_selection import SelectionBuffers, select_tokens

    num_kv_heads = case.dims.shape[0]
    rows = len(budgets) * num_kv_heads
    indices = torch.full((rows, max(budgets) + 3), -7, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(len(case.k), dtype=torch.int32, device=DEVICE)
    select_tokens(
        buffers,
        case.packed,
        case.starts,
        case.seq_lens,
        ints(budgets),
        case.ints(forced[0]),
        case.ints(forced[1]),
        SelectionBuffers(buffers),
        indices,
        num_kv_heads,
        counts,
        ints(counted),
    )
    expected = torch.zeros_like(counts)
    selected = torch.minimum(ints(budgets), case.seq_lens).tolist()
    for row, index in enumerate(indices):
        if counted[row // num_kv_heads]:
            expected[index[: selected[row // num_kv_heads]].long() // num_kv_heads] += 1
    assert torch.equal(counts, expected)
    return indices


def test_select_tokens_counts_the_selections_of_counting_lanes_by_slot() -> None:
    """Sparse lanes, a short one, and one that does not count."""
    case = make_case((300, 20, 129, 150), 2, 2, 16, 8)
    buffers = scored(case, written_labels(case, LABEL_FORMATS["bf16"]), "mean", 2, 3)
    budgets = [40, 40, 30, 30]
    indices = count_selections(case, buffers, budgets, [1, 1, 0, 1], (2, 3))
    check_selection(case, buffers, indices, budgets, (2, 3))


def test_select_tokens_counts_the_selections_of_a_row_that_is_ranked_whole() -> None:
    """The sample sees only high scores, so the threshold estimate is too high."""
    from fasa_sglang.ops.token_importance import ScoreBuffers

    seq_len, budget = 16384, 9000
    case = make_case((seq_len,), 1, 1, 16, 8)
    buffers = ScoreBuffers(1, 1, seq_len, "mean", DEVICE)
    position = torch.arange(seq_len, device=DEVICE)
    buffers.scores[0] = torch.where(position % 16 < 8, 100.0, 0.0) + position / seq_len
    count_selections(case, buffers, [budget], [1], (0, 0))
