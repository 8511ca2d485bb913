"""Config and tokenizer of a model on disk or on the hub."""

from __future__ import annotations

from typing import Any

import torch

from fasa_sglang.errors import FasaError


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


def load_causal_lm(model: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The language model of a folder, for forward passes outside SGLang."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
