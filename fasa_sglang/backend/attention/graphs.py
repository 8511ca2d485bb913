"""CUDA graphs of decode steps: every batch size is captured once per ``Variant``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fasa_sglang.backend.attention.base import FasaBackend
from fasa_sglang.backend.attention.variant import Variant
from fasa_sglang.backend.host import full_attention_backend


def capture_every_variant(original: Callable[..., None], runner: Any, *args: Any) -> None:
    """Capture all batch sizes once per variant.

    SGLang has its own graph variants since 0.5.20; this also works in 0.5.17.
    """
    backend = full_attention_backend(runner)
    if not isinstance(backend, FasaBackend) or not backend.has_variants:
        original(runner, *args)
        return
    for variant in Variant:
        backend.capturing = variant
        original(runner, *args)
    backend.capturing = None


def name_variant(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Add the variant to the key under which SGLang stores and looks up a graph."""
    backend = full_attention_backend(runner)
    if not isinstance(backend, FasaBackend) or not backend.has_variants:
        return result
    label = "-".join(filter(None, (result.variant_label, backend.variant.value)))
    return replace(result, variant_label=label)
