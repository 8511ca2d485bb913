"""Capture the queries and keys of a transformers model as its attention sees them, after RoPE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HOOKED = "sdpa"
Consumer = Callable[[int, torch.Tensor, torch.Tensor, float], None]


@contextmanager
def capture_qk(consume: Consumer) -> Iterator[None]:
    """Hand the q and k of every attention call to ``consume``, one layer at a time.

    Replaces transformers' ``sdpa`` attention by one that looks first, and puts it back on exit.
    The model has to be loaded with ``attn_implementation="sdpa"``. Nothing is kept, so memory
    holds one layer's tensors.

    Args:
        consume: Called with the layer number; q ``[HQ, T, D]``; k ``[HKV, T, D]``, both after
            RoPE (and qk-norm) in the model's dtype; and the scale of ``q @ k``.
    """
    original = ALL_ATTENTION_FUNCTIONS[HOOKED]

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        scaling = kwargs.get("scaling")
        sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        consume(int(module.layer_idx), query[0], key[0], float(sm_scale))
        return original(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[HOOKED] = attention
    try:
        yield
    finally:
        # The registered function lies below the one just set; deleting ours uncovers it.
        del ALL_ATTENTION_FUNCTIONS[HOOKED]
