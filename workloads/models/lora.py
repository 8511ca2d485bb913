"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) of linear layers."""

from __future__ import annotations

import math

import torch
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Times the product of the two factors; part of every adapter file's meaning.
SCALE = 2.0


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable product of two thin matrices.

    Args:
        base: The layer, ``[out, in]``.
        rank: Inner dimension of the product.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        # In float32, because steps of the optimiser are too small for bfloat16.
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.down = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        thin = nn.functional.linear(x, self.down.to(x.dtype))
        return self.base(x) + SCALE * nn.functional.linear(thin, self.up.to(x.dtype))


def attach(model: nn.Module, attention_rank: int, mlp_rank: int) -> dict[str, LoraLinear]:
    """Freeze a model and put adapters on its layers' projections.

    Args:
        model: Its projections are called as in ``ATTENTION`` and ``MLP``.
        attention_rank: Rank of the projections of attention.
        mlp_rank: Rank of the projections of MLPs.

    Returns:
        The adapters by the names of the layers that they wrap.
    """
    model.requires_grad_(False)
    ranks = dict.fromkeys(ATTENTION, attention_rank) | dict.fromkeys(MLP, mlp_rank)
    wrapped = {}
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own in ranks and isinstance(module, nn.Linear):
            wrapped[name] = LoraLinear(module, ranks[own])
            setattr(model.get_submodule(parent), own, wrapped[name])
    return wrapped


def fold(model: nn.Module, adapters: dict[str, LoraLinear]) -> None:
    """Add each adapter to the weight that it wraps, and put the plain layer back.

    The sum is rounded to the weight's dtype, as in the merged model's files.
    """
    for name, adapter in adapters.items():
        weight = adapter.base.weight
        weight.data = merged(weight.data, adapter.down.data, adapter.up.data)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, adapter.base)


def merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The weight of a layer with its adapter, ``[out, in]`` in the dtype of ``weight``.

    Args:
        weight: Of the layer, ``[out, in]``.
        down: ``[rank, in]``.
        up: ``[out, rank]``.
    """
    return (weight.float() + SCALE * up.float() @ down.float()).to(weight.dtype)
