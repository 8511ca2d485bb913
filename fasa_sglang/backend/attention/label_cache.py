"""The label cache: the dominant dims of every cached key, packed, one row per KV slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.layer_plan import LayerPlan
from fasa_sglang.ops.label_format import LabelFormat
from fasa_sglang.ops.layer_labels import LayerLabels


class LabelCache:
    """Labels of the layers of this rank that select.

    Labels are computed from the KV pool after a forward pass has written its keys, whichever kernel
    wrote them, so a slot that another request reuses through the radix tree has its label.

    Args:
        k_buffers: The KV pool's keys, one ``[num_slots, num_kv_heads, head_dim]`` per layer of
            this stage. They must outlive this object and stay where they are.
        dominant: The calibration of this rank's heads.
        plan: Kind of every layer.
        num_fcs: Chunks that a label holds.
        label_format: How labels are stored.

    Attributes:
        labels: ``[selecting_layers, num_slots, num_kv_heads, 2 * num_fcs]``.
    """

    def __init__(
        self,
        k_buffers: Sequence[torch.Tensor],
        dominant: DominantFCs,
        plan: LayerPlan,
        num_fcs: int,
        label_format: LabelFormat,
    ) -> None:
        num_slots, num_kv_heads, _ = k_buffers[0].shape
        device = k_buffers[0].device
        layers = plan.selecting
        dims = dominant.dims(num_fcs)[layers]
        mean = dominant.k_mean[layers].gather(-1, dims)
        scale = torch.ones(dims.shape)
        if label_format.scaled:
            # Dims that were constant during calibration keep a scale of 1.
            spread = dominant.k_scale[layers].gather(-1, dims)
            scale = torch.where(spread > 0, spread, 1.0)
        self._dims = dims.int().to(device)
        self._mean, self._scale = mean.to(device), scale.to(device)
        self._head_dims = dominant.head_dims(num_fcs)[layers].to(device)
        self._keys = [k_buffers[plan.pool_index(layer)] for layer in layers]
        self._format = label_format
        self.labels = label_format.empty_cache(
            len(layers), num_slots, num_kv_heads, num_fcs, device
        )
        parts = zip(self.labels, self._dims, self._scale, strict=True)
        self._layers = {
            layer: LayerLabels(*part, label_format)
            for layer, part in zip(layers, parts, strict=True)
        }
        self._index = {layer: i for i, layer in enumerate(layers)}
        if device.type == "cuda" and layers:
            from fasa_sglang.ops.label_write import KeyPool

            self._key_pool = KeyPool(self._keys)

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
