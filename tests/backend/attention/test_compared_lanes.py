"""Lanes of one batch that ask for other selectors than FASA, as the GPU backend serves them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fasa_sglang.backend.attention.compared_lanes import compared_lanes
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.ops import reference
from fasa_sglang.requests import FasaRequest

HQ, HKV, D = 4, 2, 8


def test_each_lane_gets_its_own_rows_of_the_pool() -> None:
    """Among lanes that are dense or use FASA, with whole prompts, and shorter than the budget."""
    oracle = FasaRequest(8, 1, 2, selector="oracle")
    whole = FasaRequest(8, 1, 2, prefix="full", selector="oracle")
    lanes = [
        LaneStep(None, 30, 10),
        LaneStep(oracle, 25, 10),
        LaneStep(FasaRequest(8, 1, 2), 12, 3),
        LaneStep(whole, 40, 21),
        LaneStep(oracle, 5, 2),
    ]
    torch.manual_seed(0)
    total = sum(lane.seq_len for lane in lanes)
    slots = torch.randperm(total + 1)[:total].int()
    k_cache, q = torch.randn(total + 1, HKV, D), torch.randn(len(lanes), HQ, D)
    # The oracle needs no labels.
    labels: Any = SimpleNamespace(head_dims=[None])
    groups = compared_lanes(lanes, slots)
    assert [group.lanes.tolist() for group in groups] == [[1, 4], [3]]
    for group in groups:
        chosen = group.select(q, k_cache, labels, 0, D**-0.5, "nrm")
        assert chosen.dtype == torch.int32
        for row, i in zip(chosen, group.lanes.tolist(), strict=True):
            begin = sum(lane.seq_len for lane in lanes[:i]) + lanes[i].full_prefix_len
            own = slots[begin : begin + lanes[i].seq_len - lanes[i].full_prefix_len][None].long()
            length = torch.tensor([own.shape[1]])
            scores = reference.oracle_importance(
                q[i : i + 1], k_cache, own, length, sm_scale=D**-0.5
            )
            sink = 0 if lanes[i].full_prefix_len else 1
            positions, lens = reference.select_tokens(scores, length, budget=8, sink=sink, recent=2)
            for h in range(HKV):
                count = int(lens[0, h])
                expected = own[0, positions[0, h, :count]] * HKV + h
                assert sorted(row[h, :count].tolist()) == sorted(expected.tolist())


def test_a_batch_of_ours_has_none() -> None:
    lanes = [LaneStep(None, 3, 1), LaneStep(FasaRequest(8, 1, 2), 4, 1)]
    assert compared_lanes(lanes, torch.arange(7).int()) == []
