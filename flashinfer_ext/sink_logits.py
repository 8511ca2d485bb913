"""Attention sinks: a learned logit per query head that takes part in the softmax without a value.

FlashInfer's wrappers have no argument for them, but the log-sum-exp of an attention without sinks
tells which share of the softmax its tokens would have had.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def apply_sink_logits(out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> None:
    """Turn an attention output without sinks into the one with them, in place.

    Args:
        out: ``[num_tokens, num_qo_heads, head_dim]``.
        lse: Logarithm to base 2 of each softmax sum, ``[num_tokens, num_qo_heads]``, float32.
        sink_logits: ``[num_qo_heads]``; compared with the scaled logits.
    """
    share = torch.sigmoid(lse * math.log(2) - sink_logits)
    out.mul_(share.unsqueeze(-1))


class SinkWrapper:
    """A FlashInfer wrapper for one layer with attention sinks; called like the wrapper itself.

    Args:
        wrapper: A paged prefill or decode wrapper, planned.
        sink_logits: As in ``apply_sink_logits``.
    """

    def __init__(self, wrapper: Any, sink_logits: torch.Tensor) -> None:
        self._wrapper, self._sink_logits = wrapper, sink_logits

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """FlashInfer's ``forward`` with sinks."""
        out: torch.Tensor
        out, lse = self._wrapper.forward_return_lse(*args, **kwargs)
        apply_sink_logits(out, lse, self._sink_logits)
        return out
