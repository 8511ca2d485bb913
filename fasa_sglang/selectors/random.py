"""Random tokens: the null baseline."""

from __future__ import annotations

import torch

from fasa_sglang.ops.reference import mask_past_end
from fasa_sglang.selectors.base import DecodeView, Selector


class Random(Selector):
    """Ranks tokens at random.

    A request's scores depend on its seed alone, not on the device or on the rest of the batch.
    """

    name = "random"
    summary = "random tokens, the null baseline"

    def scores(self, view: DecodeView) -> torch.Tensor:
        """See ``Selector.scores``."""
        device = view.seq_lens.device
        rows = _hash(torch.tensor([seed % 2**32 for seed in view.seeds], device=device))
        rows = _hash(rows[:, None] + torch.arange(view.num_kv_heads, device=device))
        scores = _hash(rows[..., None] + torch.arange(view.max_len, device=device))
        return mask_past_end(scores.float(), view.seq_lens)


def _hash(x: torch.Tensor) -> torch.Tensor:
    """A pseudo-random number below 2 ** 32 per element, int64. Source: Wellons' ``lowbias32``."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
