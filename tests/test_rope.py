"""Rotations are measured: pairs, angles and scale of every layout, and what is no rotation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasa_sglang.errors import UnsupportedModelError
from fasa_sglang.rope import Rotation, measure_rotation


def rotate_by(
    rotation: Rotation, dtype: torch.dtype = torch.float32
) -> Callable[..., torch.Tensor]:
    """A rotary embedding that does what ``rotation`` says, in a dtype."""

    def rotate(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = zip(positions.tolist(), x.double(), strict=True)
        matrices = {p: rotation.matrix(p).to(dtype).double() for p in set(positions.tolist())}
        return torch.stack([row @ matrices[p] for p, row in rows]).to(dtype)

    return rotate


def interleaved(head_dim: int, rotary_dim: int) -> Rotation:
    plain = Rotation.neox(head_dim, rotary_dim)
    return replace(plain, pairs=tuple((2 * i, 2 * i + 1) for i in range(rotary_dim // 2)))


# On busy cores an example takes longer than the 200 ms that Hypothesis allows.
@settings(deadline=None)
@given(
    half_rotary=st.integers(1, 24),
    half_rest=st.integers(0, 24),
    is_interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    theta=st.sampled_from([1e4, 5e5, 1e7]),
    scale=st.sampled_from([1.0, 1.35, 0.8]),
)
def test_measure_rotation_finds_what_a_module_does(
    half_rotary: int,
    half_rest: int,
    is_interleaved: bool,
    dtype: torch.dtype,
    theta: float,
    scale: float,
) -> None:
    head_dim, rotary_dim = 2 * (half_rotary + half_rest), 2 * half_rotary
    expected = replace(Rotation.neox(head_dim, rotary_dim, theta), scale=scale)
    if is_interleaved:
        expected = replace(expected, pairs=interleaved(head_dim, rotary_dim).pairs)
    measured = measure_rotation(rotate_by(expected, dtype), head_dim, "it")
    assert measured.equals(expected), (measured, expected)
    dims = measured.chunk_dims()
    assert dims.shape == (head_dim // 2, 2) and measured.num_chunks == head_dim // 2
    assert dims.flatten().sort().values.tolist() == list(range(head_dim))


def test_measure_rotation_of_the_identity_has_no_pairs() -> None:
    measured = measure_rotation(lambda positions, x: x, 8, "it")
    assert measured == Rotation(8, (), ())
    assert measured.describe() == "no rotation of 8 dims"


def test_measure_rotation_of_angles_of_both_signs_keeps_the_sign() -> None:
    rotation = replace(Rotation.neox(4), angles=(1.0, -0.01))
    assert measure_rotation(rotate_by(rotation), 4, "it").equals(rotation)


@pytest.mark.parametrize(
    "rotate",
    [
        lambda positions, x: x.roll(1, dims=-1),
        lambda positions, x: x * (1 + positions[:, None]),
        lambda positions, x: x + positions[:, None] * 2.0**12,
        lambda positions, x: torch.full_like(x, torch.nan),
        # A rotation whose angle does not grow with the position.
        lambda positions, x: rotate_by(Rotation.neox(8))(positions.clamp(max=1), x),
        # Pairs that share a dim.
        lambda positions, x: x + 0.5 * positions[:, None] * x.roll(2, dims=-1),
    ],
    ids=["roll", "growing", "shift", "nan", "constant", "chain"],
)
def test_measure_rotation_of_something_else_is_refused(
    rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"turns pairs of dims .* but it does something"
    ):
        measure_rotation(rotate, 8, "it")


def test_matrix_is_the_rotation_of_row_vectors() -> None:
    rotation = Rotation.neox(4, theta=100.0)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    turned = x @ rotation.matrix(3)
    torch.testing.assert_close(turned, torch.tensor([math.cos(3), 0, math.sin(3), 0]).double())


def test_equals_tells_bases_layouts_and_scales_apart() -> None:
    rotation = Rotation.neox(64)
    assert rotation.equals(replace(rotation, angles=tuple(1.002 * a for a in rotation.angles)))
    others = (
        Rotation.neox(64, theta=5e5),
        Rotation.neox(64, 32),
        Rotation.neox(128),
        interleaved(64, 64),
        replace(rotation, scale=1.1),
    )
    assert not any(rotation.equals(other) for other in others)


@pytest.mark.parametrize(
    ("head_dim", "pairs", "angles"),
    [(7, (), ()), (8, ((0, 1),), ()), (8, ((0, 1), (1, 2)), (1.0, 1.0)), (8, ((0, 8),), (1.0,))],
)
def test_rotation_that_cannot_be_is_refused(
    head_dim: int, pairs: tuple[tuple[int, int], ...], angles: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=r"rotation needs|pairs must be"):
        Rotation(head_dim, pairs, angles)
