"""The rotary modules of a model, applied to vectors so that their rotation can be measured."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from fasa_sglang.errors import UnsupportedModelError
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
        frequencies = [name for name, _ in module.named_buffers() if name.endswith("inv_freq")]
        if frequencies and not hasattr(module, "cos_sin_cache"):
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
    """Rotate with cosines and sines, by the function that is beside the module for its model.

    Raises:
        UnsupportedModelError: There is no such function.
    """
    apply = getattr(import_module(type(module).__module__), "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModelError(
            f"FASA measures rotary embeddings by applying them, but there is no "
            f"apply_rotary_pos_emb beside {type(module).__name__}; serve this model with another "
            "attention backend"
        )
    # Where each type of layers has frequencies of its own, only these layers are measured.
    kind = ("full_attention",) if hasattr(module, "layer_types") else ()
    with torch.inference_mode():
        cos, sin = module(x[None], positions[None], *kind)
        _, at_one = module(x[None, :1], torch.ones_like(positions[None, :1]), *kind)
        rotary_dim = cos.shape[-1] * (2 if _has_column_per_pair(at_one.flatten()) else 1)
        part = x[None, None, :, :rotary_dim]
        rotated, _ = apply(part, part, cos, sin)
    return torch.cat((rotated[0, 0], x[:, rotary_dim:]), dim=-1)


def _has_column_per_pair(sin: torch.Tensor) -> bool:
    """Whether a row of sines has one column per pair, as those of gpt-oss, instead of two."""
    halves, neighbours = sin.chunk(2), (sin[::2], sin[1::2])
    return not (torch.equal(*halves) or torch.equal(*neighbours))
