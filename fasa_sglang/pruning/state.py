"""What pruning knows about one running request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class ThinkEndScan:
    """Finds the token that ends a reply's thinking. Each token is examined once.

    Attributes:
        end: Index of that token in the reply; None if it has not been generated yet.
    """

    def __init__(self) -> None:
        self.end: int | None = None
        self._scanned = 0

    def advance(self, output_ids: Sequence[int], end_ids: Sequence[int]) -> int | None:
        """Examine the tokens that were generated since the last call.

        Args:
            output_ids: The reply so far; it only grows between calls.
            end_ids: Tokens that end the thinking.

        Returns:
            ``end``.
        """
        while self.end is None and self._scanned < len(output_ids):
            if output_ids[self._scanned] in end_ids:
                self.end = self._scanned
            self._scanned += 1
        return self.end


@dataclass
class PruneState:
    """Pruning of one request since its last prefill.

    Args:
        pruned: Tokens that have lost their slots.
        total: The same summed over all prefills; the reply reports it.
        live: Generated tokens with a slot, as last reported to the metrics.
        scored_from: Tokens of the request before its first sparse step; None until that step is
            launched. Averages of these tokens begin there.
        thinking: Where the thinking ends, for servers with ``think_end_ids``.
    """

    pruned: int = 0
    total: int = 0
    live: int = 0
    scored_from: int | None = None
    thinking: ThinkEndScan = field(default_factory=ThinkEndScan)

    def restart(self) -> None:
        """A prefill gives the request new slots, in which nothing has been pruned or scored."""
        self.pruned = 0
        self.scored_from = None
        # SGLang drops the reply of a retracted request that was given as embeddings.
        self.thinking = ThinkEndScan()
