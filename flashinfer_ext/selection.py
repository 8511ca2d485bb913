"""FlashInfer's top-k over our scores: what ``ops.token_selection`` is measured against."""

from __future__ import annotations

import os

import flashinfer
import torch

FLASHINFER_TOPK_MAX = 2048


def flashinfer_topk(
    scores: torch.Tensor,
    slots: torch.Tensor,
    row_lens: torch.Tensor,
    row_requests: torch.Tensor,
    budget: int,
) -> torch.Tensor:
    """The slots of each row's best tokens by FlashInfer's filtered top-k.

    It has one budget for all rows, ends at 2048 tokens, and gives a row to one thread block.

    Args:
        scores: ``[B * HKV, >= longest]``, float32.
        slots: ``[B, longest]``, int32.
        row_lens: Tokens of each row's request, ``[B * HKV]``, int32.
        row_requests: Each row's request, ``[B * HKV]``, int32.
        budget: Tokens to keep, at most ``FLASHINFER_TOPK_MAX``.

    Returns:
        Slots, ``[B * HKV, budget]``, int32, -1 where a row is shorter.
    """
    # 0.6.x's other algorithm has a race between thread blocks that share a row.
    os.environ["FLASHINFER_TOPK_ALGO"] = "filtered"
    return flashinfer.top_k_page_table_transform(
        scores, slots, row_lens, budget, row_to_batch=row_requests
    )
