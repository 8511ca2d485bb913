"""What the host tells the kernels of a sparse step."""

from __future__ import annotations

import torch

from fasa_sglang.backend.step import LaneStep
from fasa_sglang.flashinfer_ext.lane_table import FIELDS, LaneTable
from fasa_sglang.requests import FasaRequest

MAX_BUDGET = 64


def test_lanes_are_split_into_dense_and_selectable_tokens() -> None:
    """Dense, sparse, sparse with its whole prompt, sparse and short, and a padding lane."""
    lanes = [
        LaneStep(None, seq_len=100, prompt_len=90),
        LaneStep(FasaRequest(40, sink=4, recent=8), seq_len=50, prompt_len=30),
        LaneStep(FasaRequest(40, sink=4, recent=0, prefix="full"), seq_len=130, prompt_len=80),
        LaneStep(FasaRequest(64, sink=4, recent=8), seq_len=20, prompt_len=15),
    ]
    seq_lens = [100, 50, 130, 20, 1]
    table = LaneTable(5, 2, MAX_BUDGET, torch.device("cpu"))
    table.fill(lanes, seq_lens)
    assert table.indptr.tolist() == [0, 100, 150, 280, 300, 301]
    # Selectable tokens begin behind the densely attended ones.
    assert table.starts.tolist() == [100, 100, 230, 280, 301]
    assert table.seq_lens.tolist() == [0, 50, 50, 20, 0]
    assert table.budgets.tolist() == [0, 40, 40, 64, 0]
    # A prompt that is attended anyway needs no sink; the current token is always recent.
    assert table.sinks.tolist() == [0, 4, 0, 4, 0]
    assert table.recents.tolist() == [0, 8, 1, 8, 0]
    assert table.dense_lengths.tolist() == [100, 0, 80, 0, 1]
    assert table.focused_lengths.tolist() == [0, 40, 40, 20, 0]
    pages = torch.tensor(seq_lens)
    assert (pages - 1 + table.dense_last_page_len).tolist() == [100, 0, 80, 0, 1]
    focused = MAX_BUDGET - 1 + table.focused_last_page_len
    assert focused.tolist() == [0, 0, 40, 40, 40, 40, 20, 20, 0, 0]
    for lane, dense, kept in zip(lanes, table.dense_lengths, table.focused_lengths, strict=False):
        assert dense + kept == lane.attended_len


def test_pruned_tokens_are_neither_selected_from_nor_attended() -> None:
    """A lane with gaps, one that prunes but has none yet, one whose whole prompt is attended."""
    pruning = {"sink": 4, "recent": 8, "prune": "generated"}
    lanes = [
        LaneStep(FasaRequest(40, **pruning), seq_len=100, prompt_len=10, pruned=55),
        LaneStep(FasaRequest(40, **pruning), seq_len=50, prompt_len=30),
        LaneStep(FasaRequest(40, **pruning, prefix="full"), seq_len=130, prompt_len=80, pruned=20),
        LaneStep(None, seq_len=70, prompt_len=30),
    ]
    seq_lens = [100, 50, 130, 70, 1]
    table = LaneTable(5, 1, MAX_BUDGET, torch.device("cpu"))
    table.fill(lanes, seq_lens)
    # Each lane keeps the room of all its tokens; what is left lies at its front.
    assert table.indptr.tolist() == [0, 100, 150, 280, 350, 351]
    assert table.starts.tolist() == [0, 100, 230, 350, 351]
    assert table.seq_lens.tolist() == [45, 50, 30, 0, 0]
    assert table.focused_lengths.tolist() == [40, 40, 30, 0, 0]
    assert table.live_lengths.tolist() == table.live_lens.tolist() == [45, 50, 110, 70, 1]
    pages = torch.tensor(seq_lens)
    assert (pages - 1 + table.live_last_page_len).tolist() == [45, 50, 110, 70, 1]
    assert (pages - 1 + table.dense_last_page_len).tolist() == [0, 0, 80, 70, 1]
    assert table.pruned.tolist() == [55, 0, 20, 0, 0]
    assert table.counted.tolist() == [1, 1, 1, 0, 0]
    assert table.prompt_lens.tolist() == [10, 30, 80, 0, 0]
    for lane, dense, kept in zip(lanes, table.dense_lengths, table.focused_lengths, strict=False):
        assert dense + kept == lane.attended_len


def test_a_second_step_leaves_nothing_of_the_first() -> None:
    table = LaneTable(2, 1, MAX_BUDGET, torch.device("cpu"))
    table.fill([LaneStep(FasaRequest(40, 4, 8), 50, 30)] * 2, [50, 50])
    table.fill([], [7, 9])
    assert table.seq_lens.tolist() == [0, 0]
    assert table.budgets.tolist() == table.sinks.tolist() == table.recents.tolist() == [0, 0]
    assert table.dense_lengths.tolist() == [7, 9]


def test_fields_are_aligned_for_any_batch_size() -> None:
    """Triton compiles a kernel anew for every combination of aligned and unaligned arguments."""
    for batch_size in range(1, 9):
        table = LaneTable(batch_size, 3, MAX_BUDGET, torch.device("cpu"))
        base = table.starts.data_ptr()
        for name in (*FIELDS, "indptr", "focused_last_page_len"):
            assert (getattr(table, name).data_ptr() - base) % 16 == 0
