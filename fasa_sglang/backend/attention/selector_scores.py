"""Scores of the selector that a request names, from the label cache and the KV pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fasa_sglang.backend.attention.label_cache import LabelCache
from fasa_sglang.ops import reference
from fasa_sglang.requests import FasaRequest
from fasa_sglang.selectors import SELECTORS, DecodeView


def selector_scores(
    request: FasaRequest,
    labels: LabelCache,
    layer: int,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    lengths: Sequence[int],
    *,
    sm_scale: float,
    combine: str,
) -> torch.Tensor:
    """Score the selectable tokens of lanes with equal requests.

    Args:
        request: The request of all lanes.
        labels: This rank's labels.
        layer: Layer of the model; one that selects.
        q: Queries after RoPE, ``[B, HQ, D]``.
        k_cache: Keys after RoPE, ``[num_slots, HKV, D]``.
        slots: Position to slot, ``[B, L]``, int64; entries from a lane's length on are ignored.
        seq_lens: Tokens of each lane, ``[B]``, int64.
        lengths: The same numbers on the host.
        sm_scale: Multiplies ``q @ k``.
        combine: How a group's query heads are combined.

    Returns:
        ``[B, HKV, L]``, float32, ``-inf`` from a lane's length on.
    """

    def label_scores() -> torch.Tensor:
        return reference.token_importance(
            q, labels.layer(layer), slots, seq_lens, sm_scale=sm_scale, combine=combine
        )

    view = DecodeView(
        q=q,
        k_cache=k_cache,
        slots=slots,
        seq_lens=seq_lens,
        label_scores=label_scores,
        head_dims=labels.head_dims(layer),
        sm_scale=sm_scale,
        combine=combine,
        # Different draws for every layer and step, the same ones in a repeated run.
        seeds=[hash((request.seed, layer, length)) for length in lengths],
    )
    return SELECTORS[request.selector].scores(view)
