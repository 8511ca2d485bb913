"""Write labels on the GPU: the dominant dims of new keys, packed into their slots' rows.

Labels narrower than 16 bits are stored relative to the calibration's mean and scale of each dim.
The mean shifts all scores of a query alike, which no ranking notices, and the scale moves into the
query, so that reading a label costs neither. Reference: ``ops.reference.pack_labels``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FP8_MAX = 448.0


@triton.jit
def _label_write_kernel(
    k_ptr,
    dims_ptr,
    mean_ptr,
    scale_ptr,
    slots_ptr,
    labels_ptr,
    k_stride_t,
    k_stride_h,
    H: tl.constexpr,
    F: tl.constexpr,
    ROW: tl.constexpr,
    LIMIT: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, ROW)
    m_r = o_r < H * F
    b_dim = tl.load(dims_ptr + o_r, mask=m_r, other=0)
    p_k = k_ptr + i_t * k_stride_t + (o_r // F) * k_stride_h + b_dim
    b_k = tl.load(p_k, mask=m_r, other=0.0).to(tl.float32)  # [ROW]
    b_mean = tl.load(mean_ptr + o_r, mask=m_r, other=0.0)
    b_scale = tl.load(scale_ptr + o_r, mask=m_r, other=1.0)
    b_label = (b_k - b_mean) / b_scale
    if LIMIT > 0:
        b_label = tl.minimum(tl.maximum(b_label, -LIMIT), LIMIT)
    slot = tl.load(slots_ptr + i_t).to(tl.int64)
    p_label = labels_ptr + slot * (H * F) + o_r
    tl.store(p_label, b_label.to(labels_ptr.dtype.element_ty), mask=m_r)


def write_labels(
    k: torch.Tensor,
    dominant_dims: torch.Tensor,
    label_mean: torch.Tensor,
    label_scale: torch.Tensor,
    slots: torch.Tensor,
    label_cache: torch.Tensor,
) -> None:
    """Store the labels of new keys.

    Args:
        k: Keys after RoPE, ``[num_tokens, HKV, D]``, float16, bfloat16 or float32; dims of a head
            contiguous.
        dominant_dims: Head dims a label holds, ``[HKV, F]``, int32.
        label_mean: Subtracted before packing, ``[HKV, F]``, float32.
        label_scale: Divides what is left, ``[HKV, F]``, float32.
        slots: KV slots the keys go to, ``[num_tokens]``, int32 or int64; not range-checked.
        label_cache: Written in place, ``[num_slots, HKV, F]``, bfloat16, float16 or float8_e4m3fn.
            Values past float8's 448 saturate.
    """
    num_kv_heads, width = dominant_dims.shape
    if k.shape[0]:
        _label_write_kernel[(k.shape[0],)](
            k,
            dominant_dims,
            label_mean,
            label_scale,
            slots,
            label_cache,
            k.stride(0),
            k.stride(1),
            H=num_kv_heads,
            F=width,
            ROW=triton.next_power_of_2(num_kv_heads * width),
            LIMIT=FP8_MAX if label_cache.dtype == torch.float8_e4m3fn else 0.0,
            num_warps=4,
        )
