"""The exact answer: the softmax weights of full attention."""

from __future__ import annotations

import torch

from fasa_sglang.ops.reference import attention_logits
from fasa_sglang.selectors.base import DecodeView, Selector


class Oracle(Selector):
    """Ranks tokens by their exact softmax weight, summed over the group's query heads."""

    name = "oracle"
    summary = "the exact softmax weights"

    def scores(self, view: DecodeView) -> torch.Tensor:
        """See ``Selector.scores``."""
        logits = attention_logits(view.q, view.k_cache, view.slots, view.seq_lens, view.sm_scale)
        past_end = logits[:, :, 0] == -torch.inf
        return logits.softmax(dim=-1).sum(dim=2).masked_fill(past_end, -torch.inf)
