"""Write a tiny random model of a family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasa_sglang.workloads.models.byte_tokenizer import write_byte_tokenizer
from fasa_sglang.workloads.models.families.family import NUM_LAYERS, Family

VOCAB_SIZE = 512
FIRST_WORD = 3
"""Smallest token id that is not padding, a beginning or an end."""

COMMON_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # FlashInfer has kernels for it.
    "head_dim": 64,
    "max_position_embeddings": 1024,
    # Attention is peaked enough for the choice of tokens to show, and replies differ by prompt.
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_tiny_model(family: Family, folder: Path, dtype: torch.dtype) -> None:
    """Write a model with random weights, always the same, and a tokenizer of bytes.

    Args:
        family: The family.
        folder: Where to write; created if it does not exist.
        dtype: Dtype of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {key: value for key, value in COMMON_CONFIG.items() if key not in family.omitted}
    config = AutoConfig.for_model(family.model_type, **{**common, **family.config})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            # As large as logits, so that leaving them out changes replies.
            parameter.data.normal_(3.0, 1.0)
        if name.endswith("model.norm.weight") and config.tie_word_embeddings:
            # Every token would predict itself. This flips the signs of half of the dims, whether
            # the weight is a factor or is added to 1.
            parameter.data[::2] -= 2
    model.to(dtype).save_pretrained(folder)
    write_byte_tokenizer(folder)
