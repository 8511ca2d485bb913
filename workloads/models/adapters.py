"""Adapter files, and how one is merged into the folder of its base model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.models.lora import LoraLinear, merged
from fasa_sglang.workloads.publish import published


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter file.

    Args:
        base: Identity of the base model, such as the checksum of its file.
        factors: ``[rank, in]`` and ``[out, rank]`` by name of the layer.
    """

    base: str
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def save_adapter(path: Path, base: str, layers: Mapping[str, LoraLinear]) -> None:
    """Write an adapter in bfloat16; an older file of that name is replaced at once.

    Args:
        path: The file to write.
        base: Identity of the base model.
        layers: The adapted layers by name.
    """
    tensors = {}
    for name, layer in layers.items():
        for part in ("down", "up"):
            factor = getattr(layer, part).detach()
            tensors[f"{name}.{part}"] = factor.to("cpu", torch.bfloat16).contiguous()
    unfinished = path.with_name(f"{path.name}.part")
    save_file(tensors, unfinished, metadata={"base": base})
    os.replace(unfinished, path)


def load_adapter(path: Path) -> Adapter:
    """Read an adapter file.

    Raises:
        FasaError: It is missing, or it is not an adapter.
    """
    try:
        with safe_open(path, "pt") as file:
            base = (file.metadata() or {})["base"]
            names = sorted({key.rpartition(".")[0] for key in file.keys()})  # noqa: SIM118
            factors = {
                name: (file.get_tensor(f"{name}.down"), file.get_tensor(f"{name}.up"))
                for name in names
            }
    # safetensors has an error class of its own, which is not documented.
    except Exception as error:
        raise FasaError(
            f"{path} is not an adapter ({error}); expected a file of scripts/train_worksheet.py"
        ) from error
    return Adapter(base, factors)


def restore(layers: Mapping[str, LoraLinear], adapter: Adapter) -> None:
    """Copy an adapter's factors into adapted layers, to train on.

    Raises:
        FasaError: It adapts other layers, or with another rank.
    """
    shapes = {name: (down.shape, up.shape) for name, (down, up) in adapter.factors.items()}
    own = {name: (layer.down.shape, layer.up.shape) for name, layer in layers.items()}
    if shapes != own:
        raise FasaError(
            "the adapter to continue with has other layers or ranks than this training; train with "
            "the same ranks, or give a new file with --out"
        )
    for name, layer in layers.items():
        down, up = adapter.factors[name]
        layer.down.data.copy_(down)
        layer.up.data.copy_(up)


def merge(adapter_file: Path, base_folder: Path, base: str, folder: Path) -> None:
    """Write the folder of a base model with an adapter merged into its weights.

    Args:
        adapter_file: The adapter.
        base_folder: Hugging Face folder of the base model, with safetensors weights.
        base: Identity of the base model.
        folder: The folder to create.

    Raises:
        FasaError: The adapter is of another base model, or it is not readable.
    """
    adapter = load_adapter(adapter_file)
    factors = dict(adapter.factors)
    other_base = FasaError(
        f"{adapter_file.name} is an adapter of another base than {base_folder.name} (base "
        f"{adapter.base[:12]}, expected {base[:12]}); train one on {base_folder.name} with "
        "scripts/train_worksheet.py"
    )
    if adapter.base != base:
        raise other_base
    with published(folder) as part:
        part.mkdir()
        for path in sorted(base_folder.iterdir()):
            if path.suffix != ".safetensors":
                shutil.copy(path, part)
                continue
            weights = load_file(path)
            for name in [name for name in factors if f"{name}.weight" in weights]:
                down, up = factors.pop(name)
                weight = weights[f"{name}.weight"]
                if weight.shape != (up.shape[0], down.shape[1]):
                    raise other_base
                weights[f"{name}.weight"] = merged(weight, down, up)
            save_file(weights, part / path.name, metadata={"format": "pt"})
        if factors:
            raise other_base
