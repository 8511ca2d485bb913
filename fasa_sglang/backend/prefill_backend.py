"""The attention backend that prefills, which may be another one of SGLang's than FASA's.

Keys get their labels after the forward pass, from the KV pool, so any backend that stores keys in
the same pool can prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fasa_sglang.backend.attention.base import FasaBackend
from fasa_sglang.backend.host import full_attention_backend, split_backend


@contextmanager
def fasa_prefills(runner: Any) -> Iterator[None]:
    """Prefill by FASA's own backend, which shows queries, while a ``with`` block runs.

    Args:
        runner: SGLang's ``ModelRunner``.
    """
    split = split_backend(runner)
    if split is None:
        yield
        return
    prefill = split.prefill_backend
    split.prefill_backend = split.decode_backend
    try:
        yield
    finally:
        split.prefill_backend = prefill


def label_prefilled_keys(
    result: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> None:
    """Label the keys that a prefill has stored; a hook on ``ModelRunner.forward``."""
    backend = full_attention_backend(runner)
    if isinstance(backend, FasaBackend) and forward_batch.forward_mode.is_extend():
        backend.label_cache.write(forward_batch.out_cache_loc)
