"""Lanes whose tokens another selector than FASA chooses, as the GPU backend serves them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasa_sglang.backend.attention.compared_lanes import compared_lanes
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS
from fasa_sglang.ops.layer_labels import LayerLabels
from fasa_sglang.requests import FasaRequest
from fasa_sglang.selectors import SELECTORS, DecodeView

HQ, HKV, D, LAYER = 4, 2, 8, 3


def make_labels(k_cache: torch.Tensor) -> Any:
    """A label cache whose only layer is ``LAYER``, with two of four chunks."""
    dims = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]])
    ones = torch.ones(dims.shape)
    bf16 = LABEL_FORMATS["bf16"]
    labels = LayerLabels(bf16.pack(k_cache, dims, 0 * ones, ones), dims.int(), ones, bf16)
    head_dims = (torch.arange(HQ)[:, None] + torch.arange(D) % 4 < 4).float()
    return SimpleNamespace(
        layer={LAYER: labels}.__getitem__, head_dims={LAYER: head_dims}.__getitem__
    )


@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "fasa"])
def test_select_into_writes_the_choice_of_the_selector_for_its_lanes_only(selector: str) -> None:
    """Beside dense and FASA lanes, with whole prompts, with pruned tokens, within the budget."""
    common: dict[str, Any] = {"budget": 8, "sink": 1, "recent": 2, "selector": selector, "seed": 5}
    select, whole = FasaRequest(**common), FasaRequest(**common, prefix="full")
    prunes = FasaRequest(**common, prune="generated")
    lanes = [
        LaneStep(None, 30, 10),
        LaneStep(select, 25, 10),
        LaneStep(FasaRequest(8, 1, 2), 12, 3),
        LaneStep(whole, 40, 21),
        LaneStep(prunes, 60, 10, pruned=20),
        LaneStep(select, 5, 2),
    ]
    generator = torch.Generator().manual_seed(0)
    total = sum(lane.seq_len for lane in lanes)
    slots = torch.randperm(total + 1, generator=generator)[:total].int()
    k_cache = torch.randn(total + 1, HKV, D, generator=generator)
    q = torch.randn(len(lanes), HQ, D, generator=generator)
    labels = make_labels(k_cache)
    groups = compared_lanes(lanes, slots)
    assert [group.lanes.tolist() for group in groups] == [[1, 5], [3], [4]]

    untouched = -7
    indices = torch.full((len(lanes) * HKV, 10), untouched, dtype=torch.int32)
    for group in groups:
        group.select_into(indices, q, k_cache, labels, LAYER, sm_scale=D**-0.5, combine="nrm")
    differs_from_fasa = False
    for i, lane in enumerate(lanes):
        rows = indices[i * HKV : (i + 1) * HKV]
        if lane.request is None or lane.request.selector == "fasa":
            assert (rows == untouched).all()
            continue
        begin = sum(other.seq_len for other in lanes[:i]) + lane.full_prefix_len
        # Live tokens come first in a lane's slots.
        own = slots[begin : begin + lane.live_len - lane.full_prefix_len][None].long()
        seq_len = own.shape[1]
        expected = reference_indices(selector, q[i : i + 1], k_cache, own, labels, lane)
        fasa = reference_indices("fasa", q[i : i + 1], k_cache, own, labels, lane)
        for h in range(HKV):
            assert set(rows[h, : min(8, seq_len)].tolist()) == expected[h]
        differs_from_fasa |= expected != fasa
    assert differs_from_fasa


def reference_indices(
    selector: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    labels: Any,
    lane: LaneStep,
) -> list[set[int]]:
    """``slot * HKV + kv_head`` of one request's selected tokens, by the reference."""
    lens = torch.tensor([slots.shape[1]])
    common: dict[str, Any] = {"sm_scale": D**-0.5, "combine": "nrm"}
    view = DecodeView(
        q=q,
        k_cache=k_cache,
        slots=slots,
        seq_lens=lens,
        label_scores=lambda: reference.token_importance(
            q, labels.layer(LAYER), slots, lens, **common
        ),
        head_dims=labels.head_dims(LAYER),
        seeds=[hash((5, LAYER, slots.shape[1]))],
        **common,
    )
    sink = 0 if lane.full_prefix_len else 1
    positions, counts = reference.select_tokens(
        SELECTORS[selector].scores(view), lens, budget=8, sink=sink, recent=2
    )
    return [
        {int(slots[0, p]) * HKV + h for p in positions[0, h, : counts[0, h]].tolist()}
        for h in range(HKV)
    ]


def test_compared_lanes_without_other_selectors_is_empty() -> None:
    lanes = [LaneStep(None, 3, 1), LaneStep(FasaRequest(8, 1, 2), 4, 1)]
    assert compared_lanes(lanes, torch.arange(7).int()) == []
