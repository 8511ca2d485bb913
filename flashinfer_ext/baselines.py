"""FlashInfer's dense decode and top-k: what ``fasa bench ops`` measures against."""

from __future__ import annotations

import os

import flashinfer
import torch

from fasa_sglang.flashinfer_ext.shrinkable_decode import BACKEND

FLASHINFER_TOPK_MAX = 2048


def flashinfer_topk(
    scores: torch.Tensor,
    slots: torch.Tensor,
    row_lens: torch.Tensor,
    row_requests: torch.Tensor,
    budget: int,
) -> torch.Tensor:
    """The slots of each row's best tokens by FlashInfer's filtered top-k.

    It has one budget of at most 2,048 tokens for all rows, and one thread block handles a row.

    Args:
        scores: ``[B * HKV, >= longest]``, float32.
        slots: ``[B, longest]``, int32.
        row_lens: Tokens of each row's request, ``[B * HKV]``, int32.
        row_requests: Each row's request, ``[B * HKV]``, int32.
        budget: Tokens to select, at most ``FLASHINFER_TOPK_MAX``.

    Returns:
        Slots, ``[B * HKV, budget]``, int32, -1 where a row is shorter.
    """
    # 0.6.x's other algorithm has a race between thread blocks that share a row.
    os.environ["FLASHINFER_TOPK_ALGO"] = "filtered"
    return flashinfer.top_k_page_table_transform(
        scores, slots, row_lens, budget, row_to_batch=row_requests
    )


def plan_dense(
    batch_size: int,
    seq_len: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    slots: torch.Tensor,
    workspace: torch.Tensor,
    sm_scale: float,
) -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
    """FlashInfer's own decode over all tokens, planned as SGLang plans it.

    Args:
        slots: ``[batch_size, seq_len]``, int32; the rest as in ``SelectedDecode``.
    """
    device = workspace.device
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty(batch_size + 1, dtype=torch.int32, device=device),
        paged_kv_indices_buffer=torch.empty(slots.numel(), dtype=torch.int32, device=device),
        paged_kv_last_page_len_buffer=torch.ones(batch_size, dtype=torch.int32, device=device),
        backend=BACKEND,
    )
    wrapper.plan(
        torch.arange(batch_size + 1, dtype=torch.int32) * seq_len,
        slots.reshape(-1),
        torch.ones(batch_size, dtype=torch.int32),
        num_qo_heads,
        num_kv_heads,
        head_dim,
        1,
        q_data_type=dtype,
        kv_data_type=dtype,
        sm_scale=sm_scale,
    )
    return wrapper
