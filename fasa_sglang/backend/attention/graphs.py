"""CUDA graphs of decode steps: every batch size is captured once per variant of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fasa_sglang.backend.attention.base import FasaBackend
from fasa_sglang.backend.attention.variant import Variant


def capture_every_variant(original: Callable[..., None], runner: Any, *args: Any) -> None:
    """Capture all batch sizes once per variant.

    SGLang 0.5.20 has a mechanism for variants and 0.5.17 has none; this works in both.
    """
    backend = getattr(runner, "attn_backend", None)
    if not isinstance(backend, FasaBackend) or not backend.has_variants:
        original(runner, *args)
        return
    for variant in Variant:
        backend.capturing = variant
        original(runner, *args)
    backend.capturing = None


def name_variant(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Give each variant of a batch size a graph key of its own, for capture and for replay."""
    backend = getattr(runner, "attn_backend", None)
    if not isinstance(backend, FasaBackend) or not backend.has_variants:
        return result
    label = "-".join(filter(None, (result.variant_label, backend.variant.value)))
    return replace(result, variant_label=label)
