"""The shape of a model's attention, which a calibration belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasa_sglang.errors import CalibrationError
from fasa_sglang.rope import Rotation

MIN_DEFAULT_FCS = 24
"""Smallest default of ``num_fcs``: half of the chunks of a small head rank tokens too badly."""

_COUNTS = ("num_layers", "num_qo_heads", "num_kv_heads")


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model's attention, as the engine that serves the model finds it.

    Args:
        architecture: Name of the model's class in its config.
        num_layers: Layers of the whole model, of all kinds.
        layers: Layers that attend to every token and rotate their heads by ``rotation``, in
            order. A calibration ranks the chunks of these layers.
        num_qo_heads: Query heads of each of these layers.
        num_kv_heads: KV heads of each of these layers.
        rotation: How these layers rotate their heads.
    """

    architecture: str
    num_layers: int
    layers: tuple[int, ...]
    num_qo_heads: int
    num_kv_heads: int
    rotation: Rotation

    @property
    def default_num_fcs(self) -> int:
        """Default number of chunks that are read per KV head."""
        return default_num_fcs(self.rotation.num_chunks)

    def check_num_fcs(self, num_fcs: int) -> None:
        """Refuse a number of chunks that a head does not have.

        Raises:
            CalibrationError: ``num_fcs`` is less than 1 or more than the number of chunks.
        """
        if not 1 <= num_fcs <= self.rotation.num_chunks:
            raise CalibrationError(
                f"num_fcs must be from 1 to the model's {self.rotation.num_chunks} frequency "
                f"chunks, got {num_fcs}"
            )

    def differences(self, served: ModelShape) -> list[str]:
        """What differs in the served model, one phrase per field with both values.

        Layers of the served model that are not among ``layers`` do not count as a difference.
        """
        names = ("architecture", *_COUNTS)
        pairs = [(name, getattr(self, name), getattr(served, name)) for name in names]
        if not set(self.layers) <= set(served.layers):
            pairs.append(("layers", self.layers, served.layers))
        differing = [
            f"{name} {mine!r} but the model has {other!r}"
            for name, mine, other in pairs
            if mine != other
        ]
        if not self.rotation.equals(served.rotation):
            differing.append(
                f"a rotary embedding with {self.rotation.describe()}, but the model has "
                f"{served.rotation.describe()}"
            )
        return differing

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; ``from_dict`` is the inverse."""
        return {**vars(self), "layers": list(self.layers), "rotation": self.rotation.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        """Convert from JSON types, the inverse of ``to_dict``.

        Raises:
            KeyError, TypeError, ValueError: A field is missing, unknown, or of the wrong type.
        """
        rotation = Rotation.from_dict(values["rotation"])
        shape = cls(**{**values, "layers": tuple(values["layers"]), "rotation": rotation})
        if type(shape.architecture) is not str:
            raise ValueError(f"architecture is {shape.architecture!r:.80}, expected a name")
        for name in _COUNTS:
            value = getattr(shape, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r:.80}, expected a positive integer")
        expected = range(shape.num_layers)
        if not all(type(layer) is int and layer in expected for layer in shape.layers):
            raise ValueError(f"layers are {shape.layers!r:.80}, expected numbers of layers")
        if not shape.layers or list(shape.layers) != sorted(set(shape.layers)):
            raise ValueError(f"layers are {shape.layers!r:.80}, expected a rising sequence")
        return shape


def default_num_fcs(num_chunks: int) -> int:
    """Half of a head's chunks, but at least ``MIN_DEFAULT_FCS``, or all if there are fewer."""
    return min(num_chunks, max(MIN_DEFAULT_FCS, num_chunks // 2))
