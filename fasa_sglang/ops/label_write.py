"""Write labels on the GPU: the dominant dims of new keys, packed into their slots' rows.

One launch serves all layers of a forward pass. It reads the keys from the KV pool, so the pool must
already hold them. Reference: ``LabelFormat.pack``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fasa_sglang.ops.label_format import LabelFormat

KEY_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# New slots are a slice of SGLang's free list, so their alignment varies from step to step.
@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _label_write_kernel(
    k_ptrs_ptr,
    dims_ptr,
    mean_ptr,
    scale_ptr,
    slots_ptr,
    labels_ptr,
    k_stride,
    labels_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    ROW: tl.constexpr,
    LIMIT: tl.constexpr,
    KEY: tl.constexpr,
):
    i_t, i_l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = tl.arange(0, ROW)
    m_r = o_r < H * F
    slot = tl.load(slots_ptr + i_t).to(tl.int64)
    p_k = tl.load(k_ptrs_ptr + i_l).to(tl.pointer_type(KEY)) + slot * k_stride
    b_dim = tl.load(dims_ptr + i_l * (H * F) + o_r, mask=m_r, other=0)
    b_k = tl.load(p_k + (o_r // F) * D + b_dim, mask=m_r, other=0.0).to(tl.float32)  # [ROW]
    b_mean = tl.load(mean_ptr + i_l * (H * F) + o_r, mask=m_r, other=0.0)
    b_scale = tl.load(scale_ptr + i_l * (H * F) + o_r, mask=m_r, other=1.0)
    b_label = (b_k - b_mean) / b_scale
    if LIMIT > 0:
        b_label = tl.minimum(tl.maximum(b_label, -LIMIT), LIMIT)
    p_label = labels_ptr + i_l * labels_stride + slot * (H * F) + o_r
    tl.store(p_label, b_label.to(labels_ptr.dtype.element_ty), mask=m_r)


class KeyPool:
    """Addresses of the keys of several layers, in the form that the kernel takes.

    Args:
        k_buffers: The KV pool's keys, one ``[num_slots, HKV, D]`` per layer, contiguous, float16,
            bfloat16 or float32. They must outlive this object and stay where they are.
    """

    def __init__(self, k_buffers: Sequence[torch.Tensor]) -> None:
        first = k_buffers[0]
        pointers = [keys.data_ptr() for keys in k_buffers]
        self.pointers = torch.tensor(pointers, dtype=torch.int64, device=first.device)
        self.num_kv_heads, self.head_dim = first.shape[1:]
        self.dtype = first.dtype


def write_labels(
    keys: KeyPool,
    dominant_dims: torch.Tensor,
    label_mean: torch.Tensor,
    label_scale: torch.Tensor,
    slots: torch.Tensor,
    labels: torch.Tensor,
    label_format: LabelFormat,
) -> None:
    """Store the labels of keys that were just written to the pool.

    Args:
        keys: The pool, after RoPE.
        dominant_dims: Head dims of the dominant chunks, ``[NL, HKV, F]``, int32.
        label_mean: Subtracted from the keys, ``[NL, HKV, F]``, float32.
        label_scale: Divides the difference, ``[NL, HKV, F]``, float32.
        slots: KV slots of the new keys, ``[num_tokens]``, int32 or int64; not range-checked.
        labels: Written in place, ``[NL, num_slots, HKV, F]``, ``label_format.dtype``.
        label_format: How labels are stored.
    """
    num_layers, num_kv_heads, width = dominant_dims.shape
    if len(slots):
        _label_write_kernel[(len(slots), num_layers)](
            keys.pointers,
            dominant_dims,
            label_mean,
            label_scale,
            slots,
            labels,
            num_kv_heads * keys.head_dim,
            labels.stride(0),
            H=num_kv_heads,
            D=keys.head_dim,
            F=width,
            ROW=triton.next_power_of_2(num_kv_heads * width),
            LIMIT=label_format.max_value or 0.0,
            KEY=KEY_TYPES[keys.dtype],
            num_warps=4,
        )
