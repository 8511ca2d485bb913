"""The label cache: the dominant dims of every cached key, packed, one row per KV slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.ops.reference import pack_labels, token_importance

LABEL_DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}


def label_bytes_per_token(
    num_layers: int, num_kv_heads: int, num_fcs: int, label_dtype: str
) -> int:
    """Bytes the label cache adds to one token of the KV pool, over ``num_layers`` layers."""
    return num_layers * num_kv_heads * 2 * num_fcs * LABEL_DTYPES[label_dtype].itemsize


class LabelCache:
    """Labels of all layers of this rank.

    Labels are read from the KV pool after a forward pass has filled it, whoever wrote the keys
    there, so a slot that any request reuses through the radix tree has its label.

    Args:
        k_buffers: The KV pool's keys, one ``[num_slots, num_kv_heads, head_dim]`` per layer.
        dominant: The calibration of these layers' heads.
        first_layer: The model's layer that ``k_buffers`` begins with.
        num_fcs: Chunks a label holds.
        label_dtype: A key of ``LABEL_DTYPES``.

    Attributes:
        dims: Head dims of a label, ``[num_layers, num_kv_heads, 2 * num_fcs]``, int32.
        scale: What a unit of each label dim is worth, shape of ``dims``, float32.
        labels: ``[num_layers, num_slots, num_kv_heads, 2 * num_fcs]``.
        head_dims: 1 at the dims that a query head would read if it had chunks of its own, 0
            elsewhere, ``[num_layers, num_qo_heads, head_dim]``, float32; for comparison.
    """

    def __init__(
        self,
        k_buffers: Sequence[torch.Tensor],
        dominant: DominantFCs,
        first_layer: int,
        num_fcs: int,
        label_dtype: str,
    ) -> None:
        layers = slice(first_layer, first_layer + len(k_buffers))
        num_slots, num_kv_heads, _ = k_buffers[0].shape
        device = k_buffers[0].device
        dims = dominant.dims(num_fcs)[layers]
        self.dims = dims.int().to(device)
        self.mean = torch.zeros(dims.shape, device=device)
        self.scale = torch.ones(dims.shape, device=device)
        if label_dtype != "bf16":
            # Dims that never moved during calibration keep a scale of one.
            spread = dominant.k_scale[layers].gather(-1, dims)
            self.scale = torch.where(spread > 0, spread, 1.0).to(device)
            self.mean = dominant.k_mean[layers].gather(-1, dims).to(device)
        self.labels = torch.zeros(
            (len(k_buffers), num_slots, num_kv_heads, 2 * num_fcs),
            dtype=LABEL_DTYPES[label_dtype],
            device=device,
        )
        self.head_dims = dominant.head_dims(num_fcs)[layers].to(device)
        self._k_buffers = k_buffers
        if device.type == "cuda":
            from fasa_sglang.ops.label_write import KeyPool

            self._keys = KeyPool(k_buffers)

    def write(self, slots: torch.Tensor) -> None:
        """Store the labels of all layers' keys in ``slots``, ``[num_tokens]``, int."""
        if self.labels.is_cuda:
            from fasa_sglang.ops.label_write import write_labels

            write_labels(self._keys, self.dims, self.mean, self.scale, slots, self.labels)
            return
        for layer, keys in enumerate(self._k_buffers):
            self.labels[layer].view(torch.uint8)[slots] = pack_labels(
                keys[slots],
                self.dims[layer].long(),
                self.mean[layer],
                self.scale[layer],
                self.labels.dtype,
            ).view(torch.uint8)

    def scores(
        self,
        layer: int,
        q: torch.Tensor,
        slots: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        sm_scale: float,
        combine: str,
    ) -> torch.Tensor:
        """``reference.token_importance`` with one of this rank's layers."""
        return token_importance(
            q,
            self.labels[layer],
            self.dims[layer].long(),
            self.scale[layer],
            slots,
            seq_lens,
            sm_scale=sm_scale,
            combine=combine,
        )
