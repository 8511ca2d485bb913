"""The rotary modules of a model, applied to vectors so that their rotation can be measured."""

from __future__ import annotations

from typing import Any

import torch

from fasa_sglang.rope import Rotation, measure_rotation


def rotary_module(ancestors: list[torch.nn.Module]) -> torch.nn.Module | None:
    """The module that rotates the heads of an attention layer; None if there is none.

    Args:
        ancestors: The modules around the layer, outermost first. A module of the whole model comes
            before one of a layer, because where Gemma-3 has both, the former is in use.
    """
    for ancestor in ancestors:
        named = getattr(ancestor, "rotary_emb", None)
        if isinstance(named, torch.nn.Module):
            return named
        for child in ancestor.children():
            if "Rotary" in type(child).__name__:
                return child
    return None


def rotation_of(module: torch.nn.Module, head_dim: int) -> Rotation:
    """Measure a rotary module.

    Args:
        module: A rotary embedding of SGLang, or one that returns cosines and sines as those of
            transformers do.
        head_dim: Dims of the heads that it rotates.

    Raises:
        UnsupportedModelError: It does not rotate pairs of dims.
    """
    device = next((tensor.device for tensor in (*module.buffers(), *module.parameters())), None)

    def rotate(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        positions, x = positions.to(device), x.to(device)
        if hasattr(module, "inv_freq") and not hasattr(module, "cos_sin_cache"):
            return _rotate_by_tables(module, positions, x)
        # The float32 code that SGLang's kernels are tested against, where there is one.
        forward: Any = getattr(module, "forward_native", module.forward)
        with torch.inference_mode():
            rotated, _ = forward(positions, x, x.clone())
        return rotated.reshape(x.shape)

    return measure_rotation(rotate, head_dim, f"{type(module).__name__} of {head_dim} dims")


def _rotate_by_tables(
    module: torch.nn.Module, positions: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Rotate with tables of cosines and sines, whose halves are the pairs."""
    with torch.inference_mode():
        cos, sin = (table.reshape(len(x), -1) for table in module(x[None], positions[None]))
        if _has_column_per_pair(module, x):
            cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    rotated, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def _has_column_per_pair(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether the tables have one column per pair, as those of gpt-oss, instead of one per dim."""
    _, sin = module(x[None, :1], torch.ones(1, 1, dtype=torch.int64, device=x.device))
    first, second = sin.flatten().chunk(2)
    return not torch.equal(first, second)
