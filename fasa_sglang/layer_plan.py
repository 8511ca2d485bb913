"""The kind of each layer of the served model: the only place that knows it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from functools import cached_property


class LayerKind(enum.Enum):
    """What a layer's decode attention reads in a sparse step."""

    SELECTS = "selects"
    """The tokens that selection chose for each KV head."""
    DENSE = "dense"
    """Every token of the request."""


@dataclass(frozen=True)
class LayerPlan:
    """The kinds of a model's layers, and the range of layers that a pipeline stage holds.

    Args:
        kinds: One entry per layer of the whole model.
        first: First layer of this stage.
        end: One past the last layer of this stage.
    """

    kinds: tuple[LayerKind, ...]
    first: int
    end: int

    @classmethod
    def of_model(cls, num_layers: int, num_dense_layers: int) -> LayerPlan:
        """The plan of a whole model whose first ``num_dense_layers`` layers stay dense."""
        dense = min(num_dense_layers, num_layers)
        kinds = (LayerKind.DENSE,) * dense + (LayerKind.SELECTS,) * (num_layers - dense)
        return cls(kinds, 0, num_layers)

    def stage(self, first: int, num_layers: int) -> LayerPlan:
        """The plan of the pipeline stage that holds ``num_layers`` layers from ``first`` on."""
        return replace(self, first=first, end=first + num_layers)

    @property
    def last(self) -> int:
        """Last layer of this stage."""
        return self.end - 1

    @cached_property
    def selecting(self) -> list[int]:
        """Layers of this stage that select, in order. Only these have labels."""
        return [i for i in range(self.first, self.end) if self.selects(i)]

    def selects(self, layer: int) -> bool:
        """Whether a layer of the model selects."""
        return self.kinds[layer] is LayerKind.SELECTS

    def pool_index(self, layer: int) -> int:
        """Index of a layer's keys and values in the stage's KV pool."""
        return layer - self.first

    def rows_attended(self, live_len: int, selected_len: int) -> int:
        """KV rows that one decode step of a request reads in the whole model, per KV head.

        Args:
            live_len: Tokens of the request that have a KV slot.
            selected_len: Tokens that a selecting layer attends to.
        """
        selecting = self.kinds.count(LayerKind.SELECTS)
        return selecting * selected_len + (len(self.kinds) - selecting) * live_len
