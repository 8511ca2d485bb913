"""What a survey of the attention layers says about the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fasa_sglang.backend.attention_layers import AttentionLayer
from fasa_sglang.backend.served_model import common_rotation, layer_kinds
from fasa_sglang.errors import UnsupportedModelError
from fasa_sglang.layer_plan import LayerKind
from fasa_sglang.rope import Rotation

MOST, FEW = Rotation.neox(16, theta=1e6), Rotation.neox(16, theta=1e4)
ROUNDED = replace(MOST, angles=tuple(1.001 * angle for angle in MOST.angles))
SELECTS, DENSE, OTHER = LayerKind.SELECTS, LayerKind.DENSE, LayerKind.OTHER


def full(layer: int, rotation: Rotation | None = MOST) -> AttentionLayer:
    return AttentionLayer(layer, True, rotation)


def window(layer: int) -> AttentionLayer:
    return AttentionLayer(layer, False, None)


def kinds(num_layers: int, *layers: AttentionLayer) -> list[LayerKind]:
    rotation = common_rotation("TestForCausalLM", layers)
    return layer_kinds(num_layers, {layer.layer: layer for layer in layers}, rotation)


def test_layer_kinds_of_a_plain_model_all_select() -> None:
    """Modules of different dtypes differ a little in what they are measured at."""
    assert kinds(3, full(0), full(1, ROUNDED), full(2)) == [SELECTS] * 3


def test_layer_kinds_of_windows_and_of_layers_without_attention_are_other() -> None:
    """Layer 1 has a window, layers 3 and 4 no attention at all."""
    assert kinds(5, full(0), window(1), full(2)) == [SELECTS, OTHER, SELECTS, OTHER, OTHER]


def test_layer_kinds_of_unrotated_layers_are_dense() -> None:
    assert kinds(3, full(0, None), full(1), full(2, None)) == [DENSE, SELECTS, DENSE]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0)])
def test_layer_kinds_of_two_rotations_select_in_the_majority(order: tuple[int, ...]) -> None:
    """The majority counts layers with rotations that are equal up to rounding."""
    layers = [full(0, FEW), full(1, FEW), full(2), full(3, ROUNDED), full(4)]
    expected = [DENSE, DENSE, SELECTS, SELECTS, SELECTS]
    assert kinds(5, *(layers[i] for i in order)) == expected


@pytest.mark.parametrize(
    ("layers", "number"),
    [([], 0), ([window(0), window(1)], 0), ([window(0), full(1, None), full(2, None)], 2)],
    ids=["no attention", "windows", "no rotation"],
)
def test_common_rotation_of_a_model_without_one_is_refused(
    layers: list[AttentionLayer], number: int
) -> None:
    message = f"none of the {number} such layers of TestForCausalLM has a rotary embedding"
    with pytest.raises(UnsupportedModelError, match=message):
        common_rotation("TestForCausalLM", layers)
