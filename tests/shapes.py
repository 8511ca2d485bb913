"""Shapes of models that exist only in tests."""

from __future__ import annotations

from typing import Any

from fasa_sglang.model_shape import ModelShape
from fasa_sglang.rope import Rotation


def make_shape(
    num_layers: int = 3,
    num_qo_heads: int = 8,
    num_kv_heads: int = 4,
    rotation: Rotation | None = None,
    **changes: Any,
) -> ModelShape:
    """A model with full attention and one RoPE in all layers; ``changes`` replaces other fields."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "num_layers": num_layers,
        "layers": tuple(range(num_layers)),
        "num_qo_heads": num_qo_heads,
        "num_kv_heads": num_kv_heads,
        "rotation": rotation or Rotation.neox(16),
    }
    return ModelShape(**{**fields, **changes})
