"""The three kinds of decode batches."""

from __future__ import annotations

import enum


class Variant(enum.Enum):
    """What the lanes of a decode batch do. Each variant has its own CUDA graphs."""

    DENSE = "dense"
    """All lanes attend to all of their tokens."""
    SPARSE = "sparse"
    """All lanes attend to selected tokens only."""
    MIXED = "mixed"
    """Any other batch: some lanes are dense, attend to their whole prompt as well, or have pruned
    tokens."""
