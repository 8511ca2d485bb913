"""Kinds of decode batches."""

from __future__ import annotations

import enum


class Variant(enum.Enum):
    """What the lanes of a decode batch do; each variant has CUDA graphs of its own."""

    DENSE = "dense"
    """All lanes attend to every token."""
    SPARSE = "sparse"
    """All lanes select, and attend to nothing else."""
    MIXED = "mixed"
    """Any other batch: some lanes select, or attend to their whole prompt and select the rest."""
