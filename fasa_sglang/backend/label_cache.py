"""The label cache: the dominant dims of every cached key, packed, one row per KV slot."""

from __future__ import annotations

import torch

from fasa_sglang.ops.reference import pack_labels

LABEL_DTYPES = {"bf16": torch.bfloat16}


def label_bytes_per_token(
    num_layers: int, num_kv_heads: int, num_fcs: int, label_dtype: str
) -> int:
    """Bytes the label cache adds to one token of the KV pool, over ``num_layers`` layers."""
    return num_layers * num_kv_heads * 2 * num_fcs * LABEL_DTYPES[label_dtype].itemsize


class LabelCache:
    """Labels of all layers.

    Args:
        dominant_dims: Head dims of the dominant FCs,
            ``[num_layers, num_kv_heads, 2 * num_fcs]``, int64, on the pool's device.
        num_slots: Rows of the KV pool.
        label_dtype: A key of ``LABEL_DTYPES``.
    """

    def __init__(self, dominant_dims: torch.Tensor, num_slots: int, label_dtype: str) -> None:
        self.dominant_dims = dominant_dims
        num_layers, num_kv_heads, width = dominant_dims.shape
        self.labels = torch.zeros(
            (num_layers, num_slots, num_kv_heads, width),
            dtype=LABEL_DTYPES[label_dtype],
            device=dominant_dims.device,
        )

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor) -> None:
        """Store the labels of new keys.

        Args:
            layer: Layer of this rank, from 0.
            slots: KV slots the keys go to, ``[num_tokens]``, int.
            k: Keys after RoPE, ``[num_tokens, num_kv_heads, head_dim]``.
        """
        labels = pack_labels(k, self.dominant_dims[layer])
        self.labels[layer, slots] = labels.to(self.labels.dtype)
