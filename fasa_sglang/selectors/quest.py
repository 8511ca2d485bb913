"""Quest: pages of tokens, ranked by an upper bound of their logits."""

from __future__ import annotations

import torch

from fasa_sglang.ops.reference import combine_group, group_heads, mask_past_end
from fasa_sglang.selectors.base import DecodeView, Selector

PAGE_SIZE = 16


class Quest(Selector):
    """Ranks pages of 16 tokens by Quest's upper bound of ``q @ k``; a page's tokens share it.

    Ties keep their order when tokens are selected, so whole pages are selected, except the last
    one, which the budget may cut. There is one set of pages per KV head.
    """

    name = "quest"
    summary = f"Quest's bounds over pages of {PAGE_SIZE} tokens"
    source = "https://arxiv.org/abs/2406.10774"

    def scores(self, view: DecodeView) -> torch.Tensor:
        """See ``Selector.scores``."""
        q = group_heads(view.q, view.num_kv_heads)
        # Padding repeats a request's last key, which does not change the bounds of its last page.
        positions = torch.arange(view.max_len + -view.max_len % PAGE_SIZE, device=view.slots.device)
        positions = torch.minimum(positions, view.seq_lens[:, None] - 1)
        keys = view.k_cache[view.slots.long().gather(1, positions)]
        pages = keys.unflatten(1, (-1, PAGE_SIZE))
        # The larger of q * low and q * high, dim by dim: the sign of q decides.
        above = torch.einsum("bhgd,bphd->bhgp", q.clamp(min=0), pages.amax(dim=2).float())
        below = torch.einsum("bhgd,bphd->bhgp", q.clamp(max=0), pages.amin(dim=2).float())
        bounds = (above + below) * view.sm_scale
        scores = bounds.repeat_interleave(PAGE_SIZE, dim=-1)[..., : view.max_len]
        return combine_group(mask_past_end(scores, view.seq_lens), view.combine)
