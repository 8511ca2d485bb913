"""How a model rotates its heads: the pairs of dims that RoPE turns together, and how fast.

Measured on the module that does it instead of looked up by model type, so that a new model needs no
entry in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fasa_sglang.errors import UnsupportedModelError

MAGNITUDE = 2.0**14
"""Length of the vectors to rotate, so that the sine of a slow angle is no subnormal in float16."""

POSITIONS = (0, 1, 2, 64)
"""Where a module is measured: unrotated, the angle, its double, and far enough for slow pairs."""

SLOW_ANGLE = 0.01
"""Angles below this are measured at the last position, where they are far below a half turn."""

TOLERANCE = 2.0**-6
"""Largest deviation of a rotated unit vector; a cosine in bfloat16 is off by up to 2**-9."""

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Rotates the vectors ``[N, head_dim]`` for the positions ``[N]``."""


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding.

    Args:
        head_dim: Dims per head, even.
        pairs: The dims that rotate together, in RoPE's order, fast to slow. Dims that are in no
            pair do not rotate.
        angles: Angle of each pair at position 1, in radians.
        scale: Factor of all rotated dims; YaRN has one.
    """

    head_dim: int
    pairs: tuple[tuple[int, int], ...]
    angles: tuple[float, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        dims = [dim for pair in self.pairs for dim in pair]
        if self.head_dim < 2 or self.head_dim % 2 or len(self.angles) != len(self.pairs):
            raise ValueError(
                f"a rotation needs an even head_dim and an angle per pair, got {self.head_dim} "
                f"dims, {len(self.pairs)} pairs and {len(self.angles)} angles"
            )
        if len(set(dims)) != len(dims) or not set(dims) <= set(range(self.head_dim)):
            raise ValueError(f"pairs must be of different dims below {self.head_dim}")

    @classmethod
    def neox(cls, head_dim: int, rotary_dim: int | None = None, theta: float = 1e4) -> Rotation:
        """RoPE as GPT-NeoX and Llama lay it out: dims ``(i, i + rotary_dim / 2)`` are a pair.

        Args:
            head_dim: Dims per head.
            rotary_dim: Number of leading dims that rotate; None for all.
            theta: RoPE's base.
        """
        rotary_dim = rotary_dim or head_dim
        half = rotary_dim // 2
        angles = tuple(theta ** (-2 * i / rotary_dim) for i in range(half))
        return cls(head_dim, tuple((i, i + half) for i in range(half)), angles)

    @property
    def num_chunks(self) -> int:
        """Frequency chunks per head, including the pairs of unrotated dims, of frequency 0."""
        return self.head_dim // 2

    def chunk_dims(self) -> torch.Tensor:
        """The two head dims of every chunk, ``[num_chunks, 2]``, int64.

        The rotated chunks come first, in RoPE's order, then unrotated dims two by two.
        """
        rotated = {dim for pair in self.pairs for dim in pair}
        rest = [dim for dim in range(self.head_dim) if dim not in rotated]
        return torch.tensor([*self.pairs, *zip(rest[::2], rest[1::2], strict=True)])

    def matrix(self, position: int) -> torch.Tensor:
        """What a head is multiplied by at a position, ``[head_dim, head_dim]``, float64.

        A head as a row vector times this matrix is the rotated head.
        """
        matrix = torch.eye(self.head_dim, dtype=torch.float64)
        for (a, b), angle in zip(self.pairs, self.angles, strict=True):
            turned = angle * position
            cos, sin = self.scale * math.cos(turned), self.scale * math.sin(turned)
            matrix[a, a] = matrix[b, b] = cos
            matrix[a, b], matrix[b, a] = sin, -sin
        return matrix

    def describe(self) -> str:
        """One line for messages."""
        if not self.pairs:
            return f"no rotation of {self.head_dim} dims"
        (a, b), last = self.pairs[0], self.angles[-1]
        return (
            f"{2 * len(self.pairs)} of {self.head_dim} dims rotated, pairs like ({a}, {b}), angles "
            f"{self.angles[0]:.3g} to {last:.3g}, scale {self.scale:.3g}"
        )

    def equals(self, other: Rotation) -> bool:
        """Whether both are the same rotation, as far as modules of different dtypes can tell."""
        return (
            (self.head_dim, self.pairs) == (other.head_dim, other.pairs)
            and math.isclose(self.scale, other.scale, rel_tol=TOLERANCE)
            and all(
                math.isclose(a, b, rel_tol=TOLERANCE)
                for a, b in zip(self.angles, other.angles, strict=True)
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; ``from_dict`` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rotation:
        """Convert from JSON types, the inverse of ``to_dict``.

        Raises:
            KeyError, TypeError, ValueError: A field is missing, unknown, or invalid.
        """
        pairs = tuple((a, b) for a, b in values["pairs"])
        rotation = cls(**{**values, "pairs": pairs, "angles": tuple(values["angles"])})
        integers = [rotation.head_dim, *(dim for pair in pairs for dim in pair)]
        if not all(type(value) is int for value in integers):
            raise ValueError("head_dim and pairs of a rotation must be integers")
        if not all(type(x) is float for x in (*rotation.angles, rotation.scale)):
            raise ValueError("angles and scale of a rotation must be numbers with a fraction")
        return rotation


def measure_rotation(rotate: Rotate, head_dim: int, name: str) -> Rotation:
    """Measure a rotary embedding by rotating unit vectors.

    Args:
        rotate: Applies the module to vectors of ``head_dim`` at given positions.
        head_dim: Dims per head.
        name: What is measured, for the message.

    Raises:
        UnsupportedModelError: The module does anything else than turning pairs of dims by an angle
            that is proportional to the position.
    """
    basis = MAGNITUDE * torch.eye(head_dim)
    matrices = [
        rotate(torch.full((head_dim,), position), basis.clone()).double().cpu() / MAGNITUDE
        for position in POSITIONS
    ]
    mixed = sum(matrix.abs() for matrix in matrices)
    assert isinstance(mixed, torch.Tensor)
    strength, partner = mixed.fill_diagonal_(0).max(dim=1)
    pairs, angles, scales = [], [], []
    for a, b in enumerate(partner.tolist()):
        if strength[a] > 0 and a < b and int(partner[b]) == a:
            pairs.append((a, b))
            angles.append(math.atan2(float(matrices[1][a, b]), float(matrices[1][a, a])))
            scales.append(float(matrices[0][a, a]))
    # A narrow dtype knows the sine of a slow angle better at a larger position.
    for i, (a, b) in enumerate(pairs):
        if abs(angles[i]) < SLOW_ANGLE:
            far = math.atan2(float(matrices[-1][a, b]), float(matrices[-1][a, a]))
            angles[i] = far / POSITIONS[-1]
    rotation = Rotation(
        head_dim, tuple(pairs), tuple(angles), sum(scales) / len(scales) if scales else 1.0
    )
    # The far position is left out: there, an angle's rounding error has grown with the position.
    for position, matrix in list(zip(POSITIONS, matrices, strict=True))[:-1]:
        deviation = float((matrix - rotation.matrix(position)).abs().max())
        if not deviation <= TOLERANCE * max(1.0, abs(rotation.scale)):
            raise UnsupportedModelError(
                f"FASA needs a rotary embedding that turns pairs of dims by angles proportional to "
                f"the position, but {name} does something else (off by {deviation:.2g} at position "
                f"{position}); serve this model with another attention backend"
            )
    return rotation
