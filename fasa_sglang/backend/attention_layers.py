"""The attention layers of a served model: what each reads, and how it rotates its heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch.nn import Module

from fasa_sglang.errors import UnsupportedModelError
from fasa_sglang.rope import Rotation
from fasa_sglang.rotary_modules import rotary_module, rotation_of

# Parameters of SGLang's attention modules that are attention sinks.
SINK_LOGITS = ("sinks", "attention_sink_bias")


@dataclass(frozen=True)
class AttentionLayer:
    """A layer with attention.

    Args:
        layer: Its number in the whole model.
        attends_to_all: Whether it reads every token; False for a sliding window or a chunk.
        rotation: How it rotates its heads; None if it does not, or does not attend to everything.
        has_sink_logits: Whether it has attention sinks, learned logits without a value.
    """

    layer: int
    attends_to_all: bool
    rotation: Rotation | None
    has_sink_logits: bool = False


def attention_layers(model: Module) -> list[AttentionLayer]:
    """The attention layers that this process holds, in order.

    Args:
        model: SGLang's model.

    Raises:
        UnsupportedModelError: A layer does what FASA cannot select for.
    """
    modules = dict(model.named_modules())
    # Modules are shared by layers, and each is measured once.
    measured: dict[tuple[int, int], Rotation] = {}
    layers = []
    for name, attention in _named_attention(model).items():
        _require_causal(attention)
        parts = name.split(".")
        ancestors = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
        has_sinks = any(getattr(ancestors[-1], name, None) is not None for name in SINK_LOGITS)
        if attention.sliding_window_size > -1 or attention.use_irope:
            layers.append(AttentionLayer(attention.layer_id, False, None, has_sinks))
            continue
        if attention.logit_cap:
            raise UnsupportedModelError(
                f"FASA ranks tokens by plain logits, but layer {attention.layer_id} caps them at "
                f"{attention.logit_cap}; serve this model with another attention backend"
            )
        rotary, rotation = rotary_module(ancestors), None
        if rotary is not None:
            key = (id(rotary), attention.qk_head_dim)
            if key not in measured:
                measured[key] = rotation_of(rotary, attention.qk_head_dim)
            rotation = measured[key] if measured[key].pairs else None
        layers.append(AttentionLayer(attention.layer_id, True, rotation, has_sinks))
    return sorted(layers, key=lambda layer: layer.layer)


def _named_attention(model: Module) -> dict[str, RadixAttention]:
    """The attention of every layer, by its name in the model or the name that it would have there.

    Where SGLang runs transformers' code of a model, it keeps the attention in a dict by layer,
    outside the modules, and the modules of transformers look it up by their ``layer_idx``.

    Raises:
        UnsupportedModelError: No module looks up a layer's attention.
    """
    modules = dict(model.named_modules())
    found = {name: module for name, module in modules.items() if isinstance(module, RadixAttention)}
    apart: dict[int, RadixAttention] = getattr(model, "attention_instances", {})
    callers = {
        module.layer_idx: name
        for name, module in modules.items()
        if hasattr(module, "layer_idx") and getattr(module, "is_causal", False)
    }
    missing = sorted(set(apart) - set(callers))
    if missing:
        raise UnsupportedModelError(
            f"FASA does not find the modules of layers {', '.join(map(str, missing))} of "
            f"{type(model).__name__}, which SGLang runs by transformers' code; serve this model "
            "with another attention backend"
        )
    return found | {f"{callers[layer]}.attn": attention for layer, attention in apart.items()}


def _require_causal(attention: Any) -> None:
    if attention.is_cross_attention or attention.attn_type is not AttentionType.DECODER:
        raise UnsupportedModelError(
            f"FASA selects among a request's own earlier tokens, but layer {attention.layer_id} "
            "attends to an encoder's output or in both directions; serve this model with another "
            "attention backend"
        )
