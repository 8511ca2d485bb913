"""Attend to chosen tokens with FlashInfer's paged decode: one plan, new indices for every layer.

The KV pool ``[num_slots, HKV, D]`` is read as ``[num_slots * HKV, 1, 1, D]``: pages of one token of
one KV head. A (request, KV head) pair is then a request of its own with ``HQ // HKV`` query heads.
"""

from __future__ import annotations

import flashinfer
import torch

# FlashInfer's tensor-core decode is the one whose lengths may shrink on the device after planning.
BACKEND = "fa2"


class FocusedAttention:
    """Decode attention over at most ``max_tokens`` tokens per (request, KV head).

    Planning happens here, once, for the longest rows; nothing is planned again. ``set_lengths``
    tells the device how many of a row's indices count, ``run`` may be captured in a CUDA graph.

    Args:
        batch_size: Requests of a batch; shorter ones run with length 1 in the lanes left over.
        num_qo_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: Dims of a head.
        max_tokens: Most tokens of a row.
        dtype: Of queries and KV pool, float16 or bfloat16.
        workspace: Float workspace, uint8, shared by instances that do not run at once.
        sm_scale: Multiplies ``q @ k``.

    Attributes:
        indices: ``slot * HKV + kv_head`` of each row's tokens, ``[batch_size * HKV, max_tokens]``,
            int32; whoever selects writes here.
    """

    def __init__(
        self,
        batch_size: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: torch.dtype,
        workspace: torch.Tensor,
        sm_scale: float,
    ) -> None:
        rows, device = batch_size * num_kv_heads, workspace.device
        self.rows, self.group, self.head_dim = rows, num_qo_heads // num_kv_heads, head_dim
        self.max_tokens = max_tokens
        # Zero is a valid index: rows that are not filled read slot 0, which no request owns.
        self.indices = torch.zeros(rows, max_tokens, dtype=torch.int32, device=device)
        self._last_page_len = torch.ones(rows, dtype=torch.int32, device=device)
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.empty(rows + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=self.indices.view(-1),
            paged_kv_last_page_len_buffer=self._last_page_len,
            backend=BACKEND,
        )
        self._wrapper.plan(
            torch.arange(rows + 1, dtype=torch.int32) * max_tokens,
            self.indices.view(-1),
            torch.ones(rows, dtype=torch.int32),
            self.group,
            1,
            head_dim,
            1,
            q_data_type=dtype,
            kv_data_type=dtype,
            sm_scale=sm_scale,
        )

    def set_lengths(self, lengths: torch.Tensor) -> None:
        """Say how many indices of each row count, once per step.

        Args:
            lengths: ``[rows]``, int32, from 1 to ``max_tokens``; not checked.

        A row was planned as ``max_tokens`` pages of one token. Its last page's length is the only
        one the device reads anew; made negative, it shortens the row by whole pages.
        """
        torch.sub(lengths, self.max_tokens - 1, out=self._last_page_len)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attend to the tokens in ``indices``.

        Args:
            q: Decode queries after RoPE, ``[batch_size, HQ, D]``, contiguous.
            k_cache: ``[num_slots, HKV, D]``, contiguous.
            v_cache: Like ``k_cache``.
            out: Receives ``[batch_size, HQ, D]``, contiguous.

        Reference: :func:`fasa_sglang.ops.reference.focused_attention`.
        """
        pool = (-1, 1, 1, self.head_dim)
        heads = (self.rows, self.group, self.head_dim)
        # Programmatic launch would read the lengths before the kernel that writes them has ended.
        paged = (k_cache.view(pool), v_cache.view(pool))
        self._wrapper.run(q.view(heads), paged, out=out.view(heads), enable_pdl=False)


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
    """FlashInfer's own decode over everything, as SGLang sets it up: the baseline of benchmarks.

    Args:
        slots: ``[batch_size, seq_len]``, int32; the rest as in ``FocusedAttention``.
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
