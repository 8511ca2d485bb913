"""Models that the server benchmarks run: real ones, or shapes with dummy weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasa_sglang.workloads.models.packaged import packaged_model
from fasa_sglang.workloads.models.shapes import SHAPES, write_shape
from fasa_sglang.workloads.serving.engine import update_weights

# What ``--shape`` accepts.
SHAPE_NAMES = (*SHAPES, "smollm2")


def served_model(shape: str, work: Path) -> tuple[str, dict[str, Any]]:
    """A folder to serve, and the engine arguments that it needs.

    Args:
        shape: One of ``SHAPE_NAMES``.
        work: Where to write the config of a shape with dummy weights.
    """
    if shape not in SHAPES:
        return str(packaged_model(shape)), {}
    write_shape(shape, work / shape)
    return str(work / shape), {"load_format": "dummy", "mem_fraction_static": 0.9}


def spread_keys(engine: Any, shape: str) -> None:
    """Give every token of the vocabulary its own hidden state, and so its own keys.

    SGLang's dummy weights, including those of the norms, are so small that the average of attention
    dominates the hidden states: all keys of a request become equal, and so do all scores, which
    does not happen in a real model. Does nothing to a real model.
    """
    if shape not in SHAPES:
        return
    config = SHAPES[shape]
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(config["vocab_size"], hidden, generator=generator)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden)}
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden)
        if config["model_type"] == "qwen3":
            for norm in ("q_norm", "k_norm"):
                weights[f"model.layers.{i}.self_attn.{norm}.weight"] = torch.ones(head_dim)
    update_weights(engine, {name: weight.bfloat16() for name, weight in weights.items()})
