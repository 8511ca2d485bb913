"""Load the transformers model that a calibration runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import transformers

from fasa_sglang.errors import CalibrationError

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
"""SGLang's names of the dtypes; it also has ``auto``."""


def load_model(
    path: str,
    device: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    On ``cuda``, accelerate spreads the model over all GPUs, and over the host's memory if it does
    not fit; without accelerate it is loaded on one GPU.

    Args:
        path: Hugging Face folder or hub name.
        device: ``cuda``, one GPU such as ``cuda:1``, or ``cpu``.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether to run the code that comes with the model.
        dtype: A key of ``DTYPES``, or ``auto`` for float32 on a CPU and bfloat16 on a GPU.

    Returns:
        The model and its tokenizer.

    Raises:
        CalibrationError: The model does not exist or cannot be loaded.
    """
    default = torch.float32 if device == "cpu" else torch.bfloat16
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    spread = device == "cuda" and find_spec("accelerate") is not None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES.get(dtype, default),
            attn_implementation="sdpa",
            device_map="auto" if spread else None,
            **source,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(
            f"cannot load the model {path} ({reason}); expected a Hugging Face folder or hub name"
        ) from error
    return (model if spread else model.to(device)).eval(), tokenizer


def context_length(model: Any) -> int | None:
    """The longest context of a model in tokens; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def memory_errors_explained(path: str) -> Iterator[None]:
    """Turn an out-of-memory error of the block into one sentence.

    Raises:
        CalibrationError: The GPU's memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if find_spec("accelerate") is None:
            remedy = (
                "run pip install accelerate, which spreads the model over all GPUs and the host's "
                "memory"
            )
        else:
            remedy = "make more GPUs visible, or pass a smaller --tokens"
        raise CalibrationError(
            f"the GPU's memory does not suffice to calibrate {path}; {remedy}, or run fasa "
            f"calibrate --model {path} --device cpu --out FILE and start the server with this file"
        ) from error
