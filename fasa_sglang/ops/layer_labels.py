"""The labels of one layer, with the dims, scale and format needed to read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fasa_sglang.ops.label_format import LabelFormat


@dataclass(frozen=True)
class LayerLabels:
    """One layer of a label cache.

    Args:
        cache: One row of labels per KV slot, ``[num_slots, HKV, F]``, ``F = 2 * num_fcs``.
        dims: Head dims that the labels hold, ``[HKV, F]``, int32.
        scale: The scale that the labels were packed with, ``[HKV, F]``, float32.
        label_format: How the labels are stored.
    """

    cache: torch.Tensor
    dims: torch.Tensor
    scale: torch.Tensor
    label_format: LabelFormat

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Labels of ``slots``, an int64 tensor of any shape, as float32 ``[..., HKV, F]``."""
        return self.label_format.unpack(self.label_format.read(self.cache, slots), self.scale)
