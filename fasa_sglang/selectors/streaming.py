"""StreamingLLM: sink tokens and a window of recent ones."""

from __future__ import annotations

import torch

from fasa_sglang.ops.reference import mask_past_end
from fasa_sglang.selectors.base import DecodeView, Selector


class Streaming(Selector):
    """Ranks newer tokens higher; together with the sink tokens this is StreamingLLM."""

    name = "streaming"
    summary = "sink and recent tokens only (StreamingLLM)"
    source = "https://arxiv.org/abs/2309.17453"

    def scores(self, view: DecodeView) -> torch.Tensor:
        """See ``Selector.scores``."""
        newer = torch.arange(view.max_len, dtype=torch.float32, device=view.seq_lens.device)
        rows = newer.expand(len(view.seq_lens), view.num_kv_heads, -1)
        return mask_past_end(rows, view.seq_lens)
