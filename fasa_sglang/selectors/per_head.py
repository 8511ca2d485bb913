"""FASA with dominant chunks for each query head, as in the paper."""

from __future__ import annotations

import torch

from fasa_sglang.ops.reference import attention_logits, combine_group
from fasa_sglang.selectors.base import DecodeView, Selector


class PerHead(Selector):
    """Ranks tokens by the chunks that are dominant for each query head, straight from the keys."""

    name = "per_head"
    summary = "FASA with chunks chosen per query head instead of per KV head"
    source = "https://arxiv.org/abs/2602.03152"

    def scores(self, view: DecodeView) -> torch.Tensor:
        """See ``Selector.scores``."""
        logits = attention_logits(
            view.q * view.head_dims, view.k_cache, view.slots, view.seq_lens, view.sm_scale
        )
        return combine_group(logits, view.combine)
