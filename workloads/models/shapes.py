"""Shapes of well-known models for runs with random weights; configs and tokenizers of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import FasaError
from fasa_sglang.model_shape import ModelShape
from fasa_sglang.rotary_modules import rotation_of

# Hugging Face configs.
SHAPES: dict[str, dict[str, Any]] = {
    "llama3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    },
}


# Label scale of a model with random weights, for ``bench.dummy_model.spread_keys``: the largest
# magnitude of its keys.
KEY_SPREAD = 0.15


def write_shape(shape: str, folder: Path) -> None:
    """Write the ``config.json`` of one of ``SHAPES``, to serve it with dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=2))


def llama_shape(config: Any) -> ModelShape:
    """The shape of a model of Llama's kind: full attention and one RoPE in all layers.

    Args:
        config: Its Hugging Face config.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        architecture=config.architectures[0],
        num_layers=config.num_hidden_layers,
        layers=tuple(range(config.num_hidden_layers)),
        num_qo_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        rotation=rotation_of(LlamaRotaryEmbedding(config), head_dim),
    )


def any_chunks(shape: ModelShape, num_fcs: int) -> DominantFCs:
    """A calibration for a model with random weights, where all chunks are equally good."""
    heads = (len(shape.layers), shape.num_kv_heads)
    chunks = shape.rotation.num_chunks
    keys = torch.zeros(*heads, shape.rotation.head_dim)
    return DominantFCs(
        model=shape,
        num_fcs=num_fcs,
        ranking=torch.arange(chunks, dtype=torch.int16).expand(*heads, chunks),
        score=torch.zeros(len(shape.layers), shape.num_qo_heads, chunks),
        k_mean=keys,
        k_scale=keys + KEY_SPREAD,
    )


def load_config(model: str) -> Any:
    """The Hugging Face config of a folder or hub name."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub name.

    Raises:
        FasaError: The model has no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FasaError(
            f"{model} has no tokenizer ({reason}); expected a Hugging Face folder or hub name"
        ) from error
