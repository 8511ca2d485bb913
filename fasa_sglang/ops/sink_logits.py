"""Attention sinks: a learned logit per query head that takes part in the softmax without a value.

FlashInfer's wrappers have no argument for them, but the log-sum-exp of an attention without sinks
tells which share of the softmax its tokens would have had.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _sink_kernel(
    out_ptr, lse_ptr, sink_ptr, num_rows, num_heads, D: tl.constexpr, BR: tl.constexpr
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < num_rows
    # exp2(lse) over exp2(lse) + exp(sink); FlashInfer's log-sum-exp is to base 2.
    b_lse = tl.load(lse_ptr + o_r, mask=m_r, other=0.0) * 0.6931471805599453
    b_sink = tl.load(sink_ptr + o_r % num_heads, mask=m_r, other=0.0).to(tl.float32)
    b_share = tl.sigmoid(b_lse - b_sink)
    p_out = out_ptr + o_r.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    b_out = tl.load(p_out, mask=m_r[:, None], other=0.0).to(tl.float32) * b_share[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_r[:, None])


def apply_sink_logits(out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> None:
    """Turn an attention output without sinks into the one with them, in place.

    Args:
        out: ``[num_tokens, num_qo_heads, head_dim]``, contiguous; ``head_dim`` a power of two.
        lse: Logarithm to base 2 of each softmax sum, ``[num_tokens, num_qo_heads]``, float32,
            contiguous.
        sink_logits: ``[num_qo_heads]``; compared with the scaled logits.

    Reference: :func:`fasa_sglang.ops.reference.focused_attention`.
    """
    assert out.is_contiguous() and lse.is_contiguous()
    num_tokens, num_heads, head_dim = out.shape
    num_rows, rows_per_block = num_tokens * num_heads, 16
    _sink_kernel[(triton.cdiv(num_rows, rows_per_block),)](
        out, lse, sink_logits, num_rows, num_heads, D=head_dim, BR=rows_per_block, num_warps=4
    )
