"""What a model's config tells of the model before it is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationMismatchError, UnsupportedModelError
from fasa_sglang.model_shape import default_num_fcs
from fasa_sglang.ops.label_format import LABEL_FORMATS


@dataclass(frozen=True)
class ModelFacts:
    """Facts that a config states; how the model rotates its heads is measured when it is served.

    Args:
        architecture: Name of the model's class.
        num_layers: Layers of all kinds.
        num_full_layers: Layers that attend to every token.
        num_qo_heads: Query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: Dims per head.
        ignored_window: A sliding window that SGLang ignores, in tokens.
    """

    architecture: str
    num_layers: int
    num_full_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    ignored_window: int | None


def model_facts(config: Any) -> ModelFacts:
    """Read the facts off a Hugging Face config.

    Args:
        config: A ``PretrainedConfig``, of the text model or of a model that contains one.

    Raises:
        UnsupportedModelError: The config alone shows that FASA cannot serve the model.
    """
    text = config.get_text_config()
    architecture = (getattr(config, "architectures", None) or [text.model_type])[0]
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{architecture} uses multi-head latent attention, FASA needs one key per KV head; "
            "serve it with another attention backend"
        )
    layer_types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    num_full = sum(kind in ("full_attention", "attention") for kind in layer_types)
    if not num_full:
        raise UnsupportedModelError(
            f"no layer of {architecture} attends to all tokens (its layers are of type "
            f"{', '.join(sorted(set(layer_types)))}), and FASA selects in such layers; serve it "
            "with another attention backend"
        )
    num_qo_heads = text.num_attention_heads
    return ModelFacts(
        architecture=architecture,
        num_layers=text.num_hidden_layers,
        num_full_layers=num_full,
        num_qo_heads=num_qo_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_qo_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_qo_heads,
        ignored_window=_ignored_window(text),
    )


def describe(facts: ModelFacts, config: FasaConfig, dominant: DominantFCs | None) -> str:
    """One sentence on a model for ``fasa doctor``.

    Args:
        facts: What its config tells.
        config: The server's settings.
        dominant: Its calibration; None if there is none yet.

    Raises:
        CalibrationMismatchError: The calibration is of a model with other heads or layers.
    """
    if dominant is not None:
        _check(facts, dominant)
    selecting = max(0, facts.num_full_layers - config.num_dense_layers)
    if dominant is not None:
        selecting = max(0, len(dominant.model.layers) - config.num_dense_layers)
    num_fcs = config.num_fcs or (
        dominant.num_fcs if dominant is not None else default_num_fcs(facts.head_dim // 2)
    )
    label_bytes = LABEL_FORMATS[config.label_dtype].bytes_per_token(
        selecting, facts.num_kv_heads, num_fcs
    )
    window = facts.ignored_window
    return (
        f"{facts.architecture}: {selecting} of {facts.num_layers} layers select, "
        f"{facts.num_full_layers} attend to all tokens; {facts.num_qo_heads} query and "
        f"{facts.num_kv_heads} KV heads of {facts.head_dim}; {label_bytes:,} bytes of labels per "
        f"token; RoPE is measured when the server starts"
        + (f"; SGLang ignores its sliding window of {window} tokens" if window else "")
    )


def _check(facts: ModelFacts, dominant: DominantFCs) -> None:
    calibrated = dominant.model
    pairs = {
        "architecture": (calibrated.architecture, facts.architecture),
        "num_layers": (calibrated.num_layers, facts.num_layers),
        "num_qo_heads": (calibrated.num_qo_heads, facts.num_qo_heads),
        "num_kv_heads": (calibrated.num_kv_heads, facts.num_kv_heads),
        "head_dim": (calibrated.rotation.head_dim, facts.head_dim),
    }
    differing = [
        f"{name} {mine!r} but the model has {other!r}"
        for name, (mine, other) in pairs.items()
        if mine != other
    ]
    if differing:
        raise CalibrationMismatchError(
            f"the calibration was made for {'; '.join(differing)}; leave it out, or run: fasa "
            "calibrate --model <the served model>"
        )


def _ignored_window(text_config: Any) -> int | None:
    """The sliding window of a config without ``layer_types``, such as Mistral's and Phi-3's.

    SGLang serves these models with full attention in all layers.
    """
    if getattr(text_config, "layer_types", None):
        return None
    if not getattr(text_config, "use_sliding_window", True):
        return None
    return getattr(text_config, "sliding_window", None) or None
