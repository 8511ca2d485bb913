"""Capture the queries and keys of a transformers model after RoPE, as its attention gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HOOKED = "sdpa"
Consumer = Callable[[int, torch.Tensor, torch.Tensor, float], None]
"""Called with a layer, its q and k, and the scale of ``q @ k``; see ``capture_qk``."""


@contextmanager
def capture_qk(consume: Consumer) -> Iterator[None]:
    """Pass the q and k of every attention call to ``consume``, one layer at a time.

    Wraps transformers' ``sdpa`` attention and restores it on exit. The model must have been loaded
    with ``attn_implementation="sdpa"``. Only one layer's tensors are in memory at a time.

    Args:
        consume: Called with the layer, counted from 0; q ``[HQ, T, D]`` and k ``[HKV, T, D]``, both
            after RoPE and qk-norm, in the model's dtype and on the layer's device; and the scale of
            ``q @ k``.
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
        # Ours shadows the registered function; deleting it restores that one.
        del ALL_ATTENTION_FUNCTIONS[HOOKED]
