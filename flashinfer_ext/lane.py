"""One request of a decode step, in the planner's terms."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lane:
    """One request of a decode batch.

    Args:
        budget: Tokens to select per KV head, ``sink`` and ``recent`` included; None attends to
            every token.
        sink: First tokens that are always selected.
        recent: Last tokens that are always selected, the current one included; at least 1.
        dense_prefix: First tokens that are attended on top of the budget.
        pruned: Number of tokens whose slots were freed; their entries among the slots are 0. They
            are never attended.
        counts_from: First position whose selections are counted; None counts no selections.
    """

    budget: int | None
    sink: int = 4
    recent: int = 32
    dense_prefix: int = 0
    pruned: int = 0
    counts_from: int | None = None

    @property
    def selects_only(self) -> bool:
        """Whether all attended tokens are selected ones and all tokens have a slot."""
        return self.budget is not None and not self.dense_prefix and not self.pruned


DENSE = Lane(budget=None)
