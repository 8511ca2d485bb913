"""The kind of each layer of the served model: the only place that knows it."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property


class LayerKind(enum.Enum):
    """What a layer's decode attention reads in a sparse step."""

    SELECTS = "selects"
    """The tokens that selection chose for each KV head."""
    DENSE = "dense"
    """Every token of the request."""
    OTHER = "other"
    """Whatever it reads without FASA: a sliding window, a recurrent state, nothing."""


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
    def of_model(cls, kinds: Iterable[LayerKind], num_dense_layers: int) -> LayerPlan:
        """The plan of a whole model.

        Args:
            kinds: The kinds of its layers.
            num_dense_layers: How many of the first layers that attend to everything stay dense.
        """
        kinds = list(kinds)
        full = [i for i, kind in enumerate(kinds) if kind is not LayerKind.OTHER]
        for layer in full[:num_dense_layers]:
            kinds[layer] = LayerKind.DENSE
        return cls(tuple(kinds), 0, len(kinds))

    def stage(self, first: int, end: int) -> LayerPlan:
        """The plan of the pipeline stage that holds the layers from ``first`` to before ``end``."""
        return replace(self, first=first, end=end)

    def only(self, layers: Collection[int]) -> LayerPlan:
        """This plan with selection in ``layers`` alone; others that would select are dense."""
        kinds = (
            LayerKind.DENSE if kind is LayerKind.SELECTS and i not in layers else kind
            for i, kind in enumerate(self.kinds)
        )
        return replace(self, kinds=tuple(kinds))

    @cached_property
    def last(self) -> int:
        """Last layer of this stage that attends to everything; -1 if there is none.

        When it has run, all keys that need labels are in the pool.
        """
        full = (i for i in self._layers if self.kinds[i] is not LayerKind.OTHER)
        return max(full, default=-1)

    @cached_property
    def selecting(self) -> list[int]:
        """Layers of this stage that select, in order. Only these have labels."""
        return [i for i in self._layers if self.selects(i)]

    @cached_property
    def reads_all_slots(self) -> bool:
        """Whether every layer of the model reads a request's slots as FASA leaves them.

        Pruning frees slots in all layers, and layers of kind ``OTHER`` do not know of it.
        """
        return LayerKind.OTHER not in self.kinds

    def selects(self, layer: int) -> bool:
        """Whether a layer of the model selects."""
        return self.kinds[layer] is LayerKind.SELECTS

    def rows_attended(self, live_len: int, selected_len: int) -> int:
        """KV rows that one decode step of a request reads in the whole model, per KV head.

        Layers of kind ``OTHER`` are not counted, because FASA does not change what they read.

        Args:
            live_len: Tokens of the request that have a KV slot.
            selected_len: Tokens that a selecting layer attends to.
        """
        selecting, dense = map(self.kinds.count, (LayerKind.SELECTS, LayerKind.DENSE))
        return selecting * selected_len + dense * live_len

    @property
    def _layers(self) -> range:
        return range(self.first, self.end)
