"""The sparse-index planner end to end on a GPU: labels and queries in, attention out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasa_sglang.flashinfer_ext.lane import DENSE, Lane

pytestmark = pytest.mark.gpu

MAX_KV_LEN, MAX_BUDGET = 9000, 600
# Group sizes from 1 to 16, labels of 24 to 64 chunks, and the alternatives to the default settings.
SHAPES = [
    (8, 4, 128, 64),
    (8, 1, 128, 48),
    (12, 2, 64, 48),
    (2, 7, 64, 64),
    (3, 3, 64, 48),
    (2, 8, 128, 128),
    (1, 16, 128, 64),
    (8, 4, 128, 64, "mean", "fp8"),
    (8, 4, 128, 64, "nrm", "bf16"),
    (4, 5, 128, 96, "mean", "bf16"),
]
# Lanes that only select, longer and shorter than their budgets.
SPARSE = [Lane(512), Lane(256, sink=0, recent=1), Lane(64), Lane(64), Lane(100)]
SPARSE_LENS = [[9000, 3000, 40, 2049, 1], [17, 64, 65, 8999, 257], [1, 600, 5000, 66, 4000]]
MIXED: list[list[Lane]] = [
    [DENSE, Lane(256), Lane(64, dense_prefix=500), Lane(128, pruned=1500, counts_from=10)],
    [Lane(100, dense_prefix=3, pruned=20, counts_from=3), DENSE, Lane(64), DENSE],
    [Lane(600), Lane(60, dense_prefix=2000), Lane(90, counts_from=7), Lane(40, pruned=8000)],
]
MIXED_LENS = [[3000, 9000, 1200, 4000, 1], [600, 5, 7000, 70, 1], [9000, 2500, 3000, 9000, 1]]


CASES = [(values, False) for values in SHAPES] + [((8, 8, 64, 48), True)]


@pytest.mark.parametrize(("values", "sinks"), CASES, ids=str)
def test_run_equals_the_reference_eagerly_and_in_graphs(values: tuple, sinks: bool) -> None:
    """One graph of sparse steps and one of mixed steps; lanes and lengths change between replays.

    Both kinds of steps share the planner, its scratch and its plans, as variants of a server do.
    """
    from planner_cases import PlannerCase, Shape

    case = PlannerCase(Shape(*values), 5, MAX_KV_LEN, MAX_BUDGET, sinks)
    steps = [(SPARSE, kv_lens, False) for kv_lens in SPARSE_LENS]
    steps += [(lanes, kv_lens, True) for lanes, kv_lens in zip(MIXED, MIXED_LENS, strict=True)]
    steps = [*steps[::2], *steps[1::2]]
    for lanes, kv_lens, mixed in steps:
        case.start(lanes, kv_lens)
        assert case.planner.mixed is mixed
        case.check(case.run())

    graphs: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor | None]] = {}
    for mixed in (False, True):
        # As a server captures: a batch of padding.
        case.start([], [1] * 5, mixed=mixed)
        case.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case.run()
            dense_out = case.run_dense() if mixed else None
        graphs[mixed] = graph, out, dense_out
    for lanes, kv_lens, mixed in [*steps, *reversed(steps)]:
        graph, out, dense_out = graphs[mixed]
        case.start(lanes, kv_lens, mixed=mixed)
        out.fill_(torch.nan)
        graph.replay()
        case.check(out)
        if dense_out is not None:
            case.check_dense(dense_out)


def test_sparse_lanes_of_a_mixed_step_equal_those_of_a_sparse_step() -> None:
    """A server falls back to the mixed variant if one lane of the batch needs it."""
    from planner_cases import PlannerCase, Shape

    case = PlannerCase(Shape(8, 4, 128, 64), 5, MAX_KV_LEN, MAX_BUDGET)
    for kv_lens in SPARSE_LENS:
        case.start(SPARSE, kv_lens, mixed=True)
        case.check(case.run())


def test_example_agrees_with_the_reference(tmp_path: Path) -> None:
    """As a user runs it, from another folder: this one's would hide the installed package."""
    script = Path(__file__).parents[2] / "examples" / "planner.py"
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("relative error") == 2
