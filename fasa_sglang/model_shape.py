"""The shape of a model's attention, read from its Hugging Face config."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from fasa_sglang.errors import CalibrationError, UnsupportedModelError
from fasa_sglang.rope import RopeLayout, rope_layout_from_config

logger = logging.getLogger(__name__)

MIN_DEFAULT_FCS = 24
"""Smallest default of ``num_fcs``: half of the chunks of a small head rank tokens too badly."""

_FIELD_TYPES: dict[str, Any] = {
    "architecture": str,
    "interleaved": bool,
    "theta": float,
    "scaling": dict,
}
"""Type of each field of ``ModelShape.flat`` that is not a positive integer."""


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model's attention, which a calibration belongs to."""

    architecture: str
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    rope: RopeLayout

    @classmethod
    def from_config(cls, config: Any, interleaved: bool | None = None) -> ModelShape:
        """Read the shape from a Hugging Face config, and log if its sliding window is ignored.

        Args:
            config: A ``PretrainedConfig``, of the text model or of a model that contains one.
            interleaved: As in ``rope_layout_from_config``.

        Raises:
            UnsupportedModelError: The model uses MLA, sliding windows in some layers, or a RoPE
                that ``rope_layout_from_config`` refuses.
        """
        get_text_config = getattr(config, "get_text_config", None)
        text = config if get_text_config is None else get_text_config()
        architecture = (getattr(config, "architectures", None) or [text.model_type])[0]
        if getattr(text, "kv_lora_rank", None):
            raise UnsupportedModelError(
                f"{architecture} uses multi-head latent attention, FASA needs one key per KV head; "
                "serve it with another attention backend"
            )
        layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
        if layer_types != {"full_attention"}:
            raise UnsupportedModelError(
                f"{architecture} has layers of type {', '.join(sorted(layer_types))}, FASA needs "
                "full attention in all layers; serve it with another attention backend"
            )
        window = ignored_window(text)
        if window is not None:
            logger.warning(
                "%s has a sliding window of %d tokens, which SGLang ignores and FASA with it: all "
                "layers attend to the whole context",
                architecture,
                window,
            )
        num_qo_heads = text.num_attention_heads
        return cls(
            architecture=architecture,
            num_layers=text.num_hidden_layers,
            num_qo_heads=num_qo_heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or num_qo_heads,
            rope=rope_layout_from_config(text, interleaved),
        )

    @property
    def default_num_fcs(self) -> int:
        """Default number of chunks per KV head: half, but at least ``MIN_DEFAULT_FCS`` or all."""
        return min(self.rope.num_chunks, max(MIN_DEFAULT_FCS, self.rope.num_chunks // 2))

    def check_num_fcs(self, num_fcs: int) -> None:
        """Refuse a number of chunks that a head does not have.

        Raises:
            CalibrationError: ``num_fcs`` is less than 1 or more than the number of chunks.
        """
        if not 1 <= num_fcs <= self.rope.num_chunks:
            raise CalibrationError(
                f"num_fcs must be from 1 to the model's {self.rope.num_chunks} frequency chunks, "
                f"got {num_fcs}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; ``from_dict`` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        """Convert from JSON types, the inverse of ``to_dict``.

        Raises:
            KeyError, TypeError, ValueError: A field is missing, unknown, or of the wrong type.
        """
        rope = RopeLayout(**values["rope"])
        shape = cls(**{**values, "rope": rope})
        for name, value in shape.flat().items():
            if name in _FIELD_TYPES:
                valid, expected = type(value) is _FIELD_TYPES[name], _FIELD_TYPES[name].__name__
            else:
                valid, expected = type(value) is int and value >= 1, "positive integer"
            if not valid:
                raise ValueError(f"{name} is {value!r:.80}, expected a {expected}")
        return shape

    def flat(self) -> dict[str, Any]:
        """All fields, including RoPE's, in one dictionary."""
        values = self.to_dict()
        rope = values.pop("rope")
        return {**values, **rope}


def ignored_window(text_config: Any) -> int | None:
    """The sliding window of a config without ``layer_types``, such as Mistral's and Phi-3's.

    SGLang serves these models with full attention in all layers.

    Returns:
        The window in tokens; None if there is none.
    """
    if getattr(text_config, "layer_types", None):
        return None
    if not getattr(text_config, "use_sliding_window", True):
        return None
    return getattr(text_config, "sliding_window", None) or None
