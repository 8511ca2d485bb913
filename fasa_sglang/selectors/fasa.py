"""FASA: the dominant frequency chunks of the keys, read from the label cache."""

from __future__ import annotations

import torch

from fasa_sglang.selectors.base import DecodeView, Selector


class Fasa(Selector):
    """Ranks tokens by their labels. On GPUs the planner's kernels do this instead."""

    name = "fasa"
    summary = "FASA's own ranking by labels"
    source = "https://arxiv.org/abs/2602.03152"

    def scores(self, view: DecodeView) -> torch.Tensor:
        """See ``Selector.scores``."""
        return view.label_scores()
