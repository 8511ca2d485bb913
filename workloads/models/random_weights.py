"""Calibrations of models with random weights, made from their configs alone."""

from __future__ import annotations

import math
from typing import Any

import torch

from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.model_shape import ModelShape
from fasa_sglang.rotary_modules import rotation_of

FULL_ATTENTION = "full_attention"
DUMMY_WEIGHT = 1e-3
# Of a thousand normal values, in standard deviations.
LARGEST_DEVIATION = 4.0


def config_shape(config: Any) -> ModelShape:
    """The shape that a server will find in a model.

    Args:
        config: The Hugging Face config of a model that has one RoPE in all layers that attend to
            every token.
    """
    rotary = type(_without_weights(config).model.rotary_emb)(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [FULL_ATTENTION] * num_layers
    return ModelShape(
        architecture=config.architectures[0],
        num_layers=num_layers,
        layers=tuple(i for i, kind in enumerate(kinds) if kind == FULL_ATTENTION),
        num_qo_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        rotation=rotation_of(rotary, head_dim),
    )


def norm_sizes(config: Any) -> dict[str, int]:
    """Length of the weight of every RMS norm, by its name in the model's checkpoint.

    Norms that multiply by one plus their weight are left out: a weight of about 0 suits them.
    """
    if config.model_type == "qwen3_next":
        return {}
    return {
        f"{name}.weight": module.weight.numel()
        for name, module in _without_weights(config).named_modules()
        if type(module).__name__.endswith("RMSNorm")
    }


def key_spread(config: Any) -> float:
    """The largest magnitude of keys in a model with dummy weights and spread hidden states.

    SGLang's dummy weights are uniform up to ``DUMMY_WEIGHT``. See
    ``bench.dummy_model.spread_keys`` for the hidden states.
    """
    modules = _without_weights(config).named_modules()
    if any(name.endswith("k_norm") for name, _ in modules):
        return LARGEST_DEVIATION
    return LARGEST_DEVIATION * DUMMY_WEIGHT * math.sqrt(config.hidden_size / 3)


def any_chunks(shape: ModelShape, num_fcs: int, spread: float = LARGEST_DEVIATION) -> DominantFCs:
    """A calibration for a model with random weights, where all chunks are equally good.

    Args:
        shape: The model's shape.
        num_fcs: Chunks that a server reads.
        spread: The largest magnitude of the model's keys.
    """
    heads = (len(shape.layers), shape.num_kv_heads)
    chunks = shape.rotation.num_chunks
    keys = torch.zeros(*heads, shape.rotation.head_dim)
    return DominantFCs(
        model=shape,
        num_fcs=num_fcs,
        ranking=torch.arange(chunks, dtype=torch.int16).expand(*heads, chunks),
        score=torch.zeros(len(shape.layers), shape.num_qo_heads, chunks),
        k_mean=keys,
        k_scale=keys + spread,
    )


def _without_weights(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
