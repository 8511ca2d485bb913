"""FASA's scores at the granularity of pages."""

from __future__ import annotations

import torch

from fasa_sglang.selectors.base import DecodeView, Selector

PAGE_SIZE = 16


class Paged(Selector):
    """Gives every token the best of FASA's scores in its page of 16 tokens."""

    name = "paged"
    summary = f"FASA's scores by pages of {PAGE_SIZE} tokens"

    def scores(self, view: DecodeView) -> torch.Tensor:
        """See ``Selector.scores``."""
        scores = view.label_scores()
        padding = (0, -view.max_len % PAGE_SIZE)
        padded = torch.nn.functional.pad(scores, padding, value=-torch.inf)
        best = padded.unflatten(-1, (-1, PAGE_SIZE)).amax(dim=-1)
        spread = best.repeat_interleave(PAGE_SIZE, dim=-1)[..., : view.max_len]
        return spread.masked_fill(scores == -torch.inf, -torch.inf)
