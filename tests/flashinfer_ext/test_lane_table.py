"""The numbers per lane that the kernels of a sparse step read."""

from __future__ import annotations

import pytest
import torch

from fasa_sglang.flashinfer_ext.lane import DENSE, Lane
from fasa_sglang.flashinfer_ext.lane_table import FIELDS, LaneTable
from fasa_sglang.ops import reference

MAX_BUDGET = 64


def make_table(batch_size: int, num_kv_heads: int = 1) -> LaneTable:
    return LaneTable(batch_size, num_kv_heads, MAX_BUDGET, torch.device("cpu"))


def test_fill_divides_lanes_into_dense_and_selectable_tokens() -> None:
    """Dense, sparse, sparse with a dense prefix, sparse within its budget, and padding."""
    lanes = [
        DENSE,
        Lane(40, sink=4, recent=8),
        Lane(40, sink=4, recent=1, dense_prefix=80),
        Lane(64, sink=4, recent=8),
    ]
    kv_lens = [100, 50, 130, 20, 1]
    table = make_table(5, num_kv_heads=2)
    table.fill(lanes, kv_lens)
    assert table.indptr.tolist() == [0, 100, 150, 280, 300, 301]
    # Selectable tokens begin behind the dense prefix.
    assert table.starts.tolist() == [100, 100, 230, 280, 301]
    assert table.selectable_lens.tolist() == [0, 50, 50, 20, 0]
    assert table.budgets.tolist() == [0, 40, 40, 64, 0]
    assert table.sinks.tolist() == [0, 4, 0, 4, 0]
    assert table.recents.tolist() == [0, 8, 1, 8, 0]
    assert table.prefix_lens.tolist() == [100, 0, 80, 0, 1]
    assert table.selected_lens.tolist() == [0, 40, 40, 20, 0]
    # FlashInfer's kernel computes the length from the planned pages and the last page's length.
    pages = torch.tensor(kv_lens)
    assert (pages - 1 + table.prefix_last_page_len).tolist() == [100, 0, 80, 0, 1]
    selected = MAX_BUDGET - 1 + table.selected_last_page_len
    assert selected.tolist() == [0, 0, 40, 40, 40, 40, 20, 20, 0, 0]
    assert [lane.selects_only for lane in lanes] == [False, True, False, True]


def test_fill_leaves_pruned_tokens_out_of_both_passes() -> None:
    """With gaps, without gaps yet, with a dense prefix, and a dense lane."""
    lanes = [
        Lane(40, recent=8, pruned=55, counts_from=10),
        Lane(40, recent=8, counts_from=30),
        Lane(40, recent=8, dense_prefix=80, pruned=20, counts_from=80),
        DENSE,
    ]
    kv_lens = [100, 50, 130, 70, 1]
    table = make_table(5)
    table.fill(lanes, kv_lens)
    # A lane's slots keep their place; those of its live tokens come first.
    assert table.indptr.tolist() == [0, 100, 150, 280, 350, 351]
    assert table.starts.tolist() == [0, 100, 230, 350, 351]
    assert table.selectable_lens.tolist() == [45, 50, 30, 0, 0]
    assert table.selected_lens.tolist() == [40, 40, 30, 0, 0]
    live = [45, 50, 110, 70, 1]
    assert table.live_host_lens.tolist() == table.live_lens.tolist() == live
    pages = torch.tensor(kv_lens)
    assert (pages - 1 + table.live_last_page_len).tolist() == live
    assert (pages - 1 + table.prefix_last_page_len).tolist() == [0, 0, 80, 70, 1]
    assert table.pruned.tolist() == [55, 0, 20, 0, 0]
    assert table.counted.tolist() == [1, 1, 1, 0, 0]
    assert table.counts_from.tolist() == [10, 30, 80, 0, 0]
    assert [lane.selects_only for lane in lanes] == [False, True, False, False]


@pytest.mark.parametrize("prefix_len", [0, 1, 3, 4, 9])
def test_fill_forces_the_same_tokens_as_the_reference(prefix_len: int) -> None:
    """A dense prefix replaces the sink, even where the prompt is shorter than the sink."""
    seq_len, budget, sink, recent = 30, 6, 4, 2
    table = make_table(1)
    table.fill([Lane(budget, sink=sink, recent=recent, dense_prefix=prefix_len)], [seq_len])
    scores = torch.arange(seq_len, dtype=torch.float32)[None, None]
    positions, lens = reference.select_tokens(
        scores,
        torch.tensor([seq_len]),
        budget=budget,
        sink=sink,
        recent=recent,
        full_prefix_lens=torch.tensor([prefix_len]),
    )
    start = int(table.starts[0])
    selectable = slice(start, start + int(table.selectable_lens[0]))
    own, own_lens = reference.select_tokens(
        scores[..., selectable],
        table.selectable_lens,
        budget=int(table.budgets[0]),
        sink=int(table.sinks[0]),
        recent=int(table.recents[0]),
    )
    assert positions[0, 0].tolist() == [*range(prefix_len), *(own[0, 0] + start).tolist()]
    assert lens[0, 0] == table.prefix_lens[0] + table.selected_lens[0]
    assert own_lens[0, 0] == table.selected_lens[0]


def test_fill_overwrites_everything_of_the_step_before() -> None:
    table, fresh = make_table(2), make_table(2)
    table.fill([Lane(40, 4, 8, pruned=3, counts_from=20), Lane(30, dense_prefix=7)], [50, 60])
    table.fill([], [7, 9])
    fresh.fill([], [7, 9])
    for name in (*FIELDS, "indptr", "selected_last_page_len"):
        assert torch.equal(getattr(table, name), getattr(fresh, name)), name
    assert table.prefix_lens.tolist() == [7, 9]


def test_fields_are_aligned_for_any_batch_size() -> None:
    """Triton compiles a kernel anew for every combination of aligned and unaligned arguments."""
    for batch_size in range(1, 9):
        table = make_table(batch_size, num_kv_heads=3)
        base = table.starts.data_ptr()
        for name in (*FIELDS, "indptr", "selected_last_page_len"):
            assert (getattr(table, name).data_ptr() - base) % 16 == 0
