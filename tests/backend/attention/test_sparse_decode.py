"""The stand-in for FlashInfer's wrapper, with a planner that records its calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.layer_plan import LayerKind, LayerPlan

pytest.importorskip("flashinfer")

CALL: dict[str, Any] = {"sm_scale": 0.125}
Q = torch.zeros(3, 4, 8)
KV_CACHE = (torch.zeros(5, 2, 8), torch.zeros(5, 2, 8))


class Planner:
    """Fails in the method named ``fails``."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> str:
            self.calls.append(name)
            if name == self.fails:
                raise torch.OutOfMemoryError("out of memory")
            return name

        return call


def make_decode(planner: Planner, layer: int) -> Any:
    from fasa_sglang.backend.attention.sparse_decode import SparseDecode

    labels: Any = SimpleNamespace(layer=lambda layer: None, labels=torch.zeros(1, 5, 2, 4))
    importance: Any = SimpleNamespace(counts=None)
    plan = LayerPlan.of_model([LayerKind.SELECTS] * 2, 1)
    stand_in: Any = planner
    decode = SparseDecode(stand_in, torch.zeros(5), labels, plan, importance, 2, "nrm")
    decode.layer = layer
    return decode


def test_forward_of_a_selecting_layer_selects_and_attends() -> None:
    planner = Planner()
    assert make_decode(planner, layer=1).forward(Q, KV_CACHE, **CALL) == "attend"
    assert planner.calls == ["select", "attend"]


def test_forward_of_a_dense_layer_attends_to_everything() -> None:
    planner = Planner()
    assert make_decode(planner, layer=0).forward(Q, KV_CACHE, **CALL) == "run_dense"
    assert planner.calls == ["run_dense"]


@pytest.mark.parametrize(
    ("fails", "layer", "stage"),
    [
        ("select", 1, "token selection"),
        ("attend", 1, "focused attention"),
        ("run_dense", 0, "dense attention"),
    ],
)
def test_forward_that_fails_raises_the_error_itself_with_a_note(
    fails: str, layer: int, stage: str
) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        make_decode(Planner(fails), layer).forward(Q, KV_CACHE, **CALL)
    assert str(caught.value) == "out of memory"
    [note] = caught.value.__notes__
    assert note.startswith(f"FASA: {stage} in layer {layer}, queries (3, 4, 8) of torch.float32")


def test_forward_of_a_layer_that_caps_its_logits_is_refused() -> None:
    with pytest.raises(UnsupportedHostError, match=r"layer 1 caps them at 30\.0"):
        make_decode(Planner(), layer=1).forward(Q, KV_CACHE, logits_soft_cap=30.0, **CALL)
