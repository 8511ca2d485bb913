"""Queries of a text at sampled positions, taken in every layer while the text is prefilled."""

from __future__ import annotations

from typing import Any

import torch


class QuerySamples:
    """Collects queries after RoPE.

    Args:
        positions: Positions in the text, ascending, ``[P]``.

    Attributes:
        sm_scales: Factor of ``q @ k`` in each layer.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self._positions = positions
        self._parts: dict[int, list[torch.Tensor]] = {}
        self.sm_scales: dict[int, float] = {}

    def take(self, layer: Any, q: torch.Tensor, forward_batch: Any) -> None:
        """Take the sampled queries of one layer's pass over a chunk of the text.

        Args:
            layer: SGLang's ``RadixAttention``.
            q: The chunk's queries, ``[tokens, HQ * D]``; rows past its end are padding.
            forward_batch: The batch, which holds the text alone.
        """
        start, length = (
            forward_batch.extend_prefix_lens_cpu[0],
            forward_batch.extend_seq_lens_cpu[0],
        )
        inside = (self._positions >= start) & (self._positions < start + length)
        rows = (self._positions[inside] - start).to(q.device)
        queries = q.reshape(len(q), layer.tp_q_head_num, layer.qk_head_dim)[rows]
        self.sm_scales[layer.layer_id] = float(layer.scaling)
        self._parts.setdefault(layer.layer_id, []).append(queries)

    def of_layer(self, layer: int) -> torch.Tensor:
        """The queries of a layer of the model at all positions, ``[HQ, P, D]``."""
        return torch.cat(self._parts[layer]).transpose(0, 1)
