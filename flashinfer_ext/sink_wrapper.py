"""FlashInfer's paged wrappers for layers with attention sinks."""

from __future__ import annotations

from typing import Any

import torch

from fasa_sglang.ops.sink_logits import apply_sink_logits


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
