"""Whether keys turn by one position more when their text moves by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fasa_sglang.backend.rotation_check import rotates
from fasa_sglang.rope import Rotation

TOKENS, HEADS = 40, 2
INTERLEAVED = replace(Rotation.neox(64), pairs=tuple((2 * i, 2 * i + 1) for i in range(32)))
SCALED = replace(Rotation.neox(64), scale=1.3)
SLOW = replace(Rotation.neox(64), angles=tuple(a / 16 for a in Rotation.neox(64).angles))
ROTATIONS = {
    "neox": Rotation.neox(64),
    "partial": Rotation.neox(64, 16),
    "interleaved": INTERLEAVED,
    "scaled": SCALED,
    "large base": Rotation.neox(128, theta=1e7),
}


def keys_at(
    rotation: Rotation, first_position: int, bias: float = 0.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Keys of a text whose first token is at a position, ``[TOKENS, HEADS, head_dim]``.

    Args:
        rotation: How the layer rotates them.
        first_position: Position of the first token.
        bias: What the layer adds to the slow half of the pairs before RoPE.
        dtype: Of the keys and of the noise of earlier layers, which rounds anew in every run.
    """
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(TOKENS, HEADS, rotation.head_dim, generator=generator)
    slow = torch.tensor(rotation.pairs)[len(rotation.pairs) // 2 :]
    keys[..., slow.flatten()] += bias
    if dtype != torch.float32:
        generator.manual_seed(first_position)
        noise = torch.randn(keys.shape, generator=generator) * torch.finfo(dtype).eps
        keys = keys * (1 + 4 * noise)
    turned = [rotation.matrix(first_position + i).float() for i in range(TOKENS)]
    return torch.einsum("thd,tde->the", keys, torch.stack(turned)).to(dtype)


@pytest.mark.parametrize("bias", [0.0, 300.0], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotates_of_keys_one_position_further_is_true(
    name: str, dtype: torch.dtype, bias: float
) -> None:
    """Some models add large biases to dims that hardly rotate, and these say little."""
    rotation = ROTATIONS[name]
    before, after = (keys_at(rotation, position, bias, dtype) for position in (0, 1))
    assert rotates(before, after, rotation)


@pytest.mark.parametrize("bias", [0.0, 300.0], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotates_of_unrotated_keys_is_false(name: str, dtype: torch.dtype, bias: float) -> None:
    rotation = ROTATIONS[name]
    identity = replace(rotation, angles=(0.0,) * len(rotation.angles))
    before, after = (keys_at(identity, position, bias, dtype) for position in (0, 1))
    assert not rotates(before, after, rotation)


@pytest.mark.parametrize(
    ("does", "should"),
    [
        ("neox", "interleaved"),
        ("interleaved", "neox"),
        ("partial", "neox"),
        ("neox", "partial"),
    ],
)
def test_rotates_of_keys_with_another_rotation_is_false(does: str, should: str) -> None:
    before, after = (keys_at(ROTATIONS[does], position) for position in (0, 1))
    assert not rotates(before, after, ROTATIONS[should])


def test_rotates_of_keys_that_turn_the_other_way_is_false() -> None:
    rotation = ROTATIONS["neox"]
    assert not rotates(keys_at(rotation, 1), keys_at(rotation, 0), rotation)


def test_rotates_of_pairs_that_are_all_slow_tells_their_rotation() -> None:
    before, after = (keys_at(SLOW, position) for position in (0, 1))
    assert rotates(before, after, SLOW)
    assert not rotates(before, after, ROTATIONS["neox"])
    assert not rotates(before, before, SLOW)
