"""The frequency chunks of a model: the pairs of head dims that RoPE rotates together.

They follow from the Hugging Face config alone, without the model's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fasa_sglang.errors import UnsupportedModelError

# Rotary layout of each known model type. True: interleaved, dims (2i, 2i+1) form a chunk. False:
# NeoX, dims (i, i + rotary_dim/2) do. tests/test_rope.py proves every entry against transformers'
# own rotation.
ROPE_INTERLEAVED: dict[str, bool] = {
    "cohere": True,
    "glm": True,
    "glm4": True,
    "glm4_moe": False,
    "gpt_neox": False,
    "granite": False,
    "llama": False,
    "mistral": False,
    "mixtral": False,
    "olmo2": False,
    "phi": False,
    "phi3": False,
    "qwen2": False,
    "qwen2_moe": False,
    "qwen3": False,
    "qwen3_moe": False,
    "stablelm": False,
}


@dataclass(frozen=True)
class RopeLayout:
    """The properties of a model's rotary embedding that its frequency chunks depend on.

    Args:
        head_dim: Dims per head.
        rotary_dim: Number of leading dims that RoPE rotates; even, at most ``head_dim``.
        interleaved: True if dims ``(2i, 2i+1)`` rotate together, False for NeoX's
            ``(i, i + rotary_dim/2)``.
        theta: RoPE's base.
        scaling: The other ``rope_parameters`` of the config, such as llama3's factors.

    Raises:
        UnsupportedModelError: ``head_dim`` or ``rotary_dim`` is odd, or ``rotary_dim`` is not
            within 1 and ``head_dim``.
    """

    head_dim: int
    rotary_dim: int
    interleaved: bool
    theta: float
    scaling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.head_dim % 2 or self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UnsupportedModelError(
                "frequency chunks need an even head_dim and an even rotary_dim within it, "
                f"got head_dim {self.head_dim} and rotary_dim {self.rotary_dim}; "
                "serve this model with another attention backend"
            )

    @property
    def num_chunks(self) -> int:
        """Frequency chunks per head, including the pairs of unrotated dims, of frequency 0."""
        return self.head_dim // 2

    def chunk_dims(self) -> torch.Tensor:
        """The two head dims of every chunk, ``[num_chunks, 2]``, int64.

        The rotated chunks come first, in RoPE's order, then pairs of adjacent unrotated dims.
        """
        half = self.rotary_dim // 2
        if self.interleaved:
            rotated = torch.arange(self.rotary_dim).view(half, 2)
        else:
            rotated = torch.stack([torch.arange(half), torch.arange(half) + half], dim=1)
        rest = torch.arange(self.rotary_dim, self.head_dim).view(-1, 2)
        return torch.cat([rotated, rest])


def rope_layout_from_config(config: Any, interleaved: bool | None = None) -> RopeLayout:
    """Read the rotary layout off a Hugging Face text config.

    Args:
        config: A ``PretrainedConfig`` (transformers 4 or 5).
        interleaved: The layout, for a model type that is not in ``ROPE_INTERLEAVED``; None looks
            it up there.

    Raises:
        UnsupportedModelError: The model has no RoPE, several RoPEs, or an unknown layout.
    """
    model_type = getattr(config, "model_type", "unknown")
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    parameters = dict(parameters or {})
    theta = parameters.pop("rope_theta", None) or getattr(config, "rope_theta", None)
    if theta is None:
        theta = getattr(config, "rotary_emb_base", None)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(
            f"model type {model_type!r} uses several RoPEs for different kinds of layers, FASA "
            "needs one for all layers; serve it with another attention backend"
        )
    if theta is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no rotary position embedding (its config has no "
            "rope_theta), and FASA selects by RoPE's frequencies; serve it with another attention "
            "backend"
        )
    if interleaved is None:
        if model_type not in ROPE_INTERLEAVED:
            raise UnsupportedModelError(
                f"the rotary layout of model type {model_type!r} is unknown, expected one of "
                f"{', '.join(sorted(ROPE_INTERLEAVED))}; if you know the layout, start fasa serve "
                'with --settings \'{"rope_layout": "neox"}\' or "interleaved", and give fasa '
                "calibrate the same with --rope-layout"
            )
        interleaved = ROPE_INTERLEAVED[model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = parameters.pop("partial_rotary_factor", None)
    for name in ("partial_rotary_factor", "rotary_pct"):
        partial = getattr(config, name, None) if partial is None else partial
    rotary_dim = head_dim if partial is None else int(head_dim * partial)
    # "type" is the older name; SGLang writes both into the configs it loads.
    old_name = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", old_name)
    if rope_type in (None, "default"):
        # Without effect on an unscaled RoPE, and SGLang adds it while it builds a model.
        parameters.pop("original_max_position_embeddings", None)
    else:
        parameters["rope_type"] = rope_type
    scaling = {key: value for key, value in sorted(parameters.items()) if value is not None}
    return RopeLayout(head_dim, rotary_dim, interleaved, float(theta), scaling)
