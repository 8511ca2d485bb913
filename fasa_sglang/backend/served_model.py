"""The served model, surveyed once its weights are loaded and before its KV pool is sized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fasa_sglang.backend.attention_layers import AttentionLayer, attention_layers
from fasa_sglang.backend.ranks import gather
from fasa_sglang.backend.served import fasa_config, uses_fasa
from fasa_sglang.backend.served_calibration import find_calibration
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import UnsupportedModelError
from fasa_sglang.layer_plan import LayerKind, LayerPlan
from fasa_sglang.model_shape import ModelShape
from fasa_sglang.rope import Rotation

_ATTRIBUTE = "fasa_served_model"


@dataclass(frozen=True)
class ServedModel:
    """What this process knows of the served model.

    Args:
        shape: The whole model's attention.
        plan: What the layers of this pipeline stage do.
        num_fcs: Frequency chunks that a label holds.
        calibration: The calibration; None if the engine has yet to make it.
        has_sink_logits: Whether layers have attention sinks, learned logits without a value.
    """

    shape: ModelShape
    plan: LayerPlan
    num_fcs: int
    calibration: DominantFCs | None
    has_sink_logits: bool


def survey_model(runner: Any, *args: Any, **kwargs: Any) -> None:
    """Survey the model of a runner that is about to allocate its KV pool.

    Raises:
        FasaError: FASA cannot serve the model, or its calibration cannot be used.
    """
    if not uses_fasa(runner.server_args) or runner.is_draft_worker:
        return
    if runner.use_mla_backend:
        raise UnsupportedModelError(
            f"{type(runner.model).__name__} uses multi-head latent attention, FASA needs one key "
            "per KV head; serve it with another attention backend"
        )
    setattr(runner.model_config, _ATTRIBUTE, _survey(runner))


def served_model(model_config: Any) -> ServedModel:
    """The model that ``survey_model`` surveyed in this process."""
    surveyed: ServedModel = getattr(model_config, _ATTRIBUTE)
    return surveyed


def _survey(runner: Any) -> ServedModel:
    model_config, stage = runner.model_config, runner.layer_info
    config = fasa_config(model_config)
    own = attention_layers(runner.model)
    # Ranks of one pipeline stage find the same, so later ones only repeat it.
    found = {layer.layer: layer for layers in gather(own) for layer in layers}
    text_config = model_config.hf_text_config
    num_layers = text_config.num_hidden_layers
    names = getattr(model_config.hf_config, "architectures", None) or [text_config.model_type]
    rotation = common_rotation(names[0], list(found.values()))
    kinds = layer_kinds(num_layers, found, rotation)
    shape = ModelShape(
        architecture=names[0],
        num_layers=num_layers,
        layers=tuple(i for i, kind in enumerate(kinds) if kind is LayerKind.SELECTS),
        num_qo_heads=model_config.num_attention_heads,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        rotation=rotation,
    )
    calibration = find_calibration(runner, shape)
    # All ranks calibrate, or none does: another server may write the file in just this moment.
    if not all(gather(calibration is not None)):
        calibration = None
    if calibration is not None:
        shape = replace(shape, layers=calibration.model.layers)
    num_fcs = config.num_fcs or (calibration.num_fcs if calibration else shape.default_num_fcs)
    shape.check_num_fcs(num_fcs)
    plan = LayerPlan.of_model(kinds, config.num_dense_layers).only(shape.layers)
    return ServedModel(
        shape=shape,
        plan=plan.stage(stage.start_layer, stage.end_layer),
        num_fcs=num_fcs,
        calibration=calibration,
        has_sink_logits=any(layer.has_sink_logits for layer in found.values()),
    )


def common_rotation(architecture: str, layers: Sequence[AttentionLayer]) -> Rotation:
    """The rotation of most layers that attend to everything.

    Raises:
        UnsupportedModelError: No layer attends to everything and rotates its heads.
    """
    rotations = [layer.rotation for layer in layers if layer.rotation is not None]
    if not rotations:
        full = sum(layer.attends_to_all for layer in layers)
        raise UnsupportedModelError(
            f"FASA selects by RoPE's frequencies in layers that attend to all tokens, but none of "
            f"the {full} such layers of {architecture} has a rotary embedding; serve this model "
            "with another attention backend"
        )
    ((first, _),) = Counter(
        next(i for i, other in enumerate(rotations) if other.equals(rotation))
        for rotation in rotations
    ).most_common(1)
    return rotations[first]


def layer_kinds(
    num_layers: int, layers: dict[int, AttentionLayer], rotation: Rotation
) -> list[LayerKind]:
    """The kinds of a model's layers.

    Args:
        num_layers: Layers of the whole model.
        layers: Those with attention, by number.
        rotation: The one that a selecting layer has; layers with another one or none stay dense.
    """
    kinds = []
    for i in range(num_layers):
        layer = layers.get(i)
        if layer is None or not layer.attends_to_all:
            kinds.append(LayerKind.OTHER)
        elif layer.rotation is None or not layer.rotation.equals(rotation):
            kinds.append(LayerKind.DENSE)
        else:
            kinds.append(LayerKind.SELECTS)
    return kinds
