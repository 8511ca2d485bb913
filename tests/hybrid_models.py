"""Small random models in which only some layers attend to every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.workloads.models.byte_tokenizer import write_byte_tokenizer

VOCAB_SIZE = 8192
WINDOW = 64
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    # Larger weights make replies in bfloat16 differ from those in float32 within a few tokens.
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A choice of experts would turn a rounding difference into another token.
ALL_EXPERTS = {"num_experts_per_tok": 2}


def gemma3() -> Any:
    """Sliding windows in every other layer, and another RoPE there; one KV pool."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layer_types = ["sliding_attention", "full_attention"] * 3
    config = Gemma3TextConfig(
        # SGLang takes Gemma's output matrix to be the embedding and skips another one.
        **{**COMMON, "tie_word_embeddings": True},
        num_hidden_layers=len(layer_types),
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=WINDOW,
        layer_types=layer_types,
    )
    model = Gemma3ForCausalLM(config)
    for layer, kind in zip(model.model.layers, layer_types, strict=True):
        # Offsets from 1. With small ones, a tied model repeats its last token.
        layer.post_attention_layernorm.weight.data.fill_(7.0)
        layer.post_feedforward_layernorm.weight.data.fill_(3.0)
        if kind == "full_attention":
            # Peaked attention, so that leaving tokens out changes replies; an offset from 1.
            layer.self_attn.q_norm.weight.data.fill_(0.7)
            layer.self_attn.k_norm.weight.data.fill_(0.7)
    return model


def gpt_oss() -> Any:
    """Sliding windows in every other layer with a KV pool of their own, and attention sinks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    layer_types = ["sliding_attention", "full_attention"] * 3
    config = GptOssConfig(
        **COMMON,
        num_hidden_layers=len(layer_types),
        head_dim=64,
        sliding_window=WINDOW,
        layer_types=layer_types,
        **ALL_EXPERTS,
        num_local_experts=2,
    )
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        # As large as logits, so that leaving them out changes replies.
        layer.self_attn.sinks.data.normal_(3.0, 1.0)
    return model


def qwen3_next() -> Any:
    """Linear attention in every other layer, gated attention in the others, a quarter rotated."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **COMMON,
        num_hidden_layers=6,
        head_dim=128,
        full_attention_interval=2,
        layer_types=["linear_attention", "full_attention"] * 3,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        **ALL_EXPERTS,
        num_experts=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
    )
    return Qwen3NextForCausalLM(config)


HYBRID_MODELS: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3,
    "gpt-oss": gpt_oss,
    "qwen3-next": qwen3_next,
}


def write_model(name: str, folder: Path) -> None:
    """Write one of ``HYBRID_MODELS`` and a tokenizer with a token per byte."""
    torch.manual_seed(0)
    HYBRID_MODELS[name]().to(torch.bfloat16).save_pretrained(folder)
    write_byte_tokenizer(folder)
