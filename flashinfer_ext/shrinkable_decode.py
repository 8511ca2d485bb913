"""FlashInfer's paged decode with lengths that change on the device after planning."""

from __future__ import annotations

from collections.abc import Sequence

import flashinfer
import numpy as np
import torch
from numpy.typing import NDArray

# FlashInfer's tensor-core decode is the one whose lengths may shrink on the device after planning.
BACKEND = "fa2"
# Plans are made for lengths rounded up to a multiple of this, so that one plan serves many steps.
PLAN_STEP = 256


class ShrinkableDecode:
    """FlashInfer's paged decode whose rows may be shorter on the device than planned.

    A row spans ``indptr[i + 1] - indptr[i]`` pages of one token. FlashInfer's kernel reads the
    length of the last page from the device at every run, so a value below 1 shortens the row by
    whole pages.

    Args:
        indptr: Start of each row's indices, ``[rows + 1]``, int32; may change between runs.
        indices: Page of every token, int32; may change between runs.
        last_page_len: ``length - (indptr[i + 1] - indptr[i]) + 1`` for every row, ``[rows]``,
            int32, where length may be 0; may change between runs.
        num_qo_heads: Query heads of a row.
        num_kv_heads: KV heads of a page.
        head_dim: Dims of a head.
        dtype: Dtype of queries and KV pool, float16 or bfloat16.
        workspace: Float workspace, uint8; instances that do not run at the same time may share it.
    """

    def __init__(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        workspace: torch.Tensor,
    ) -> None:
        rows = len(last_page_len)
        self._indptr, self._indices, self._last_page_len = indptr, indices, last_page_len
        self._heads = (num_qo_heads, num_kv_heads, head_dim)
        self._dtype = dtype
        self._page = (-1, 1, num_kv_heads, head_dim)
        self._rows = (rows, num_qo_heads, head_dim)
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last_page_len,
            backend=BACKEND,
        )
        # FlashInfer's default of 8 MiB serves thousands of rows; servers create an instance per
        # batch size.
        plan_bytes = 2**20 + 64 * rows
        self._wrapper.reset_workspace_buffer(
            workspace, torch.empty(plan_bytes, dtype=torch.uint8, device=workspace.device)
        )
        # The first plan loads the kernel and overwrites the buffers; later plans do not.
        before = indptr.clone(), last_page_len.clone()
        self._wrapper.plan(
            torch.arange(rows + 1, dtype=torch.int32, device="cpu"),
            indices[:rows],
            torch.ones(rows, dtype=torch.int32, device="cpu"),
            *self._heads,
            1,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        indptr.copy_(before[0])
        last_page_len.copy_(before[1])
        self._planned: torch.Tensor | None = None
        # fast_decode_plan rewrites a pinned buffer whose copy to the device may be in flight.
        self._plan_copied = torch.cuda.Event()

    def plan(self, lengths: Sequence[int] | NDArray[np.int32]) -> None:
        """Divide the work for rows of up to these lengths; does nothing while the plan fits.

        Args:
            lengths: Tokens of each row, ``[rows]``, on the host.
        """
        lens = torch.tensor(lengths, dtype=torch.int32, device="cpu")
        steps = (lens.clamp(min=1) - 1) // PLAN_STEP + 1
        if self._planned is not None and torch.equal(steps, self._planned):
            return
        self._plan_copied.synchronize()
        indptr = torch.zeros(len(steps) + 1, dtype=torch.int32, device="cpu")
        torch.cumsum(steps * PLAN_STEP, 0, out=indptr[1:])
        flashinfer.fast_decode_plan(
            self._wrapper,
            self._indptr,
            self._indices[: len(steps)],
            self._last_page_len,
            *self._heads,
            1,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            global_override_indptr_cpu=indptr,
        )
        self._plan_copied.record()
        self._planned = steps

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        sm_scale: float,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attend to the first ``length`` indices of every row; may be captured in a CUDA graph.

        Args:
            q: Decode queries after RoPE, contiguous, ``rows * num_qo_heads * head_dim`` elements.
            k_cache: KV pool, ``[num_slots, HKV, D]``, contiguous.
            v_cache: Like ``k_cache``.
            out: Receives the result, like ``q``. A row of length 0 is zero.
            sm_scale: Multiplies ``q @ k``.
            lse: Receives the logarithm to base 2 of each query head's softmax sum, float32.
        """
        paged = (k_cache.view(self._page), v_cache.view(self._page))
        # The wrapper's own scale is 1 / sqrt(head_dim).
        q_scale = sm_scale * self._heads[2] ** 0.5
        # Programmatic launch would read the lengths before the kernel that writes them has ended.
        self._wrapper.run(
            q.view(self._rows),
            paged,
            q_scale=q_scale,
            out=out.view(self._rows),
            lse=None if lse is None else lse.view(self._rows[:2]),
            return_lse=lse is not None,
            enable_pdl=False,
        )


class SelectedDecode(ShrinkableDecode):
    """Decode attention over selected tokens, one row per (request, KV head).

    The KV pool ``[num_slots, HKV, D]`` is read as ``[num_slots * HKV, 1, 1, D]``: pages of one
    token of one KV head. A (request, KV head) pair is then a row with ``HQ // HKV`` query heads.

    Args:
        indices: ``slot * HKV + kv_head`` of each row's tokens, ``[batch_size * HKV, max_budget]``,
            int32; all entries must be valid. The selection writes here.
        last_page_len: As in ``ShrinkableDecode``, ``[batch_size * HKV]``, int32.
        num_qo_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: Dims of a head.
        dtype: Dtype of queries and KV pool, float16 or bfloat16.
        workspace: As in ``ShrinkableDecode``.

    Reference: :func:`fasa_sglang.ops.reference.focused_attention`.
    """

    def __init__(
        self,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        workspace: torch.Tensor,
    ) -> None:
        rows, max_budget = indices.shape
        super().__init__(
            torch.arange(rows + 1, dtype=torch.int32, device=indices.device) * max_budget,
            indices.view(-1),
            last_page_len,
            num_qo_heads // num_kv_heads,
            1,
            head_dim,
            dtype,
            workspace,
        )
