"""The label cache: the dominant dims of every cached key, packed, one row per KV slot."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.ops.label_format import LabelFormat
from fasa_sglang.ops.layer_labels import LayerLabels


class LabelCache:
    """Labels of the layers of this rank that select.

    Labels are computed from the KV pool after a forward pass has written its keys, whichever kernel
    wrote them, so a slot that another request reuses through the radix tree has its label.

    The buffers that depend on the calibration are filled in place by ``use``, so CUDA graphs may be
    captured before it is known.

    Args:
        k_buffers: The KV pool's keys of the layers that select, ``[num_slots, num_kv_heads,
            head_dim]`` each, by layer. They must outlive this object and stay where they are.
        num_slots: Slots of the KV pool, the unused first ones included.
        num_kv_heads: KV heads of this rank.
        num_qo_heads: Query heads of this rank.
        head_dim: Dims of a head.
        num_fcs: Chunks that a label holds.
        label_format: How labels are stored.
        device: Where to store them.

    Attributes:
        labels: ``[selecting_layers, num_slots, num_kv_heads, 2 * num_fcs]``.
    """

    def __init__(
        self,
        k_buffers: Mapping[int, torch.Tensor],
        num_slots: int,
        num_kv_heads: int,
        num_qo_heads: int,
        head_dim: int,
        num_fcs: int,
        label_format: LabelFormat,
        device: torch.device | str,
    ) -> None:
        device = torch.device(device)
        self._index = {layer: i for i, layer in enumerate(k_buffers)}
        self._keys = list(k_buffers.values())
        self._format, self._num_fcs = label_format, num_fcs
        count = len(self._keys)
        shape = (count, num_kv_heads, 2 * num_fcs)
        # Until a calibration is in use, any dims do: nothing reads the labels.
        self._dims = torch.zeros(shape, dtype=torch.int32, device=device)
        self._mean = torch.zeros(shape, device=device)
        self._scale = torch.ones(shape, device=device)
        self._head_dims = torch.zeros(count, num_qo_heads, head_dim, device=device)
        self.labels = label_format.empty_cache(count, num_slots, num_kv_heads, num_fcs, device)
        parts = zip(self.labels, self._dims, self._scale, strict=True)
        self._layers = {
            layer: LayerLabels(*part, label_format)
            for layer, part in zip(k_buffers, parts, strict=True)
        }
        if self.labels.is_cuda and self._keys:
            from fasa_sglang.ops.label_write import KeyPool

            self._key_pool = KeyPool(self._keys)

    def use(self, dominant: DominantFCs) -> None:
        """Use a calibration; labels that were written before are void.

        Args:
            dominant: The calibration of this rank's heads.
        """
        ranked = [layer for layer in self._index if layer in dominant.model.layers]
        rows = dominant.rows(ranked)
        own = [self._index[layer] for layer in ranked]
        dims = dominant.dims(self._num_fcs)[rows]
        self._dims[own] = dims.to(self._dims)
        self._mean[own] = dominant.k_mean[rows].gather(-1, dims).to(self._mean)
        if self._format.scaled:
            # Dims that were constant during calibration keep a scale of 1.
            spread = dominant.k_scale[rows].gather(-1, dims)
            self._scale[own] = torch.where(spread > 0, spread, 1.0).to(self._scale)
        self._head_dims[own] = dominant.head_dims(self._num_fcs)[rows].to(self._head_dims)

    def layer(self, layer: int) -> LayerLabels:
        """The labels of a layer of the model, which must be one that selects."""
        return self._layers[layer]

    def head_dims(self, layer: int) -> torch.Tensor:
        """1 at the dims of a query head's own dominant chunks, 0 elsewhere.

        Returns:
            ``[num_qo_heads, head_dim]``, float32; for the ``per_head`` selector.
        """
        return self._head_dims[self._index[layer]]

    def write(self, slots: torch.Tensor) -> None:
        """Store the labels of all selecting layers' keys in ``slots``, ``[num_tokens]``, int."""
        if not self._keys:
            return
        if self.labels.is_cuda:
            from fasa_sglang.ops.label_write import write_labels

            write_labels(
                self._key_pool,
                self._dims,
                self._mean,
                self._scale,
                slots,
                self.labels,
                self._format,
            )
            return
        for i, keys in enumerate(self._keys):
            labels = self._format.pack(
                keys[slots], self._dims[i].long(), self._mean[i], self._scale[i]
            )
            self._format.store(self.labels[i], slots, labels)
