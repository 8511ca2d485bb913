"""The gate of ``fasa bench ops`` accepts right results and rejects every kind of wrong one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fasa_sglang.cli import main
from fasa_sglang.errors import FasaError
from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS
from fasa_sglang.ops.layer_labels import LayerLabels
from fasa_sglang.workloads.bench.labels import DEFAULT_LABELS, LABELS
from fasa_sglang.workloads.bench.ops import parse_choices
from fasa_sglang.workloads.bench.ops_gate import (
    check_scores,
    check_selection,
    expected_scores,
    output_error,
)

HQ, HKV, D, LENGTH, BUDGET, SINK, RECENT = 8, 2, 32, 200, 64, 4, 8
SM_SCALE = D**-0.5
FORCED = float("inf")


@dataclass
class Layer:
    """A request's right scores, selection and output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    expected: torch.Tensor
    scores: torch.Tensor
    indices: torch.Tensor
    out: torch.Tensor


@pytest.fixture(params=[(c, f) for c in reference.COMBINE_RULES for f in LABEL_FORMATS], ids=str)
def layer(request: pytest.FixtureRequest) -> Layer:
    combine, format_name = request.param
    torch.manual_seed(0)
    label_format = LABEL_FORMATS[format_name]
    q, k, v = torch.randn(HQ, D), *torch.randn(2, LENGTH + 1, HKV, D)
    slots = torch.randperm(LENGTH).int() + 1
    dims = torch.rand(HKV, D).argsort(dim=-1)[:, : D // 2]
    mean, scale = torch.randn(HKV, D // 2) / 4, torch.rand(HKV, D // 2) + 0.5
    packed = label_format.pack(k, dims, mean, scale)
    labels = LayerLabels(packed, dims.int(), scale, label_format)
    expected = expected_scores(q, labels, slots, sm_scale=SM_SCALE, combine=combine)
    scores = expected.half()
    scores[:, :SINK] = scores[:, LENGTH - RECENT :] = FORCED
    positions = scores.topk(BUDGET).indices
    indices = slots[positions] * HKV + torch.arange(HKV)[:, None]
    out = reference.focused_attention(
        q[None], k, v, slots[None], positions[None], sm_scale=SM_SCALE
    )[0]
    return Layer(q, k, v, slots, expected, scores, indices, out)


def check(layer: Layer) -> float:
    check_scores(layer.scores, layer.expected, sink=SINK, recent=RECENT, forced=FORCED)
    check_selection(layer.indices, layer.scores, layer.slots, HKV)
    return output_error(layer.out, layer.q, layer.k, layer.v, layer.indices, SM_SCALE)


def test_gate_with_right_results_passes(layer: Layer) -> None:
    assert check(layer) < 1e-5


@pytest.mark.parametrize("constant", [0.0, float("nan"), FORCED])
def test_gate_with_constant_scores_raises(layer: Layer, constant: float) -> None:
    """A selection that is right for its own scores used to pass, whatever the scores were."""
    layer.scores[:, SINK : LENGTH - RECENT] = constant
    with pytest.raises(FasaError, match=r"scores differ from the float32 reference"):
        check(layer)


def test_gate_with_one_wrong_score_names_it(layer: Layer) -> None:
    layer.scores[1, 50] += 1
    with pytest.raises(FasaError, match=r"1 of 376 scores .* KV head 1 scored token 50"):
        check(layer)


@pytest.mark.parametrize("token", [0, LENGTH - 1])
def test_gate_with_an_unforced_sink_or_recent_token_raises(layer: Layer, token: int) -> None:
    layer.scores[0, token] = 0
    with pytest.raises(FasaError, match="a sink or recent token"):
        check(layer)


def test_gate_with_a_wrong_selection_raises(layer: Layer) -> None:
    worst = layer.slots[layer.scores[1].argmin()] * HKV + 1
    for wrong in (int(worst), int(layer.indices[1, 1]), int(layer.indices[0, 0]), -5, 0, 2**30):
        right = int(layer.indices[1, 0])
        layer.indices[1, 0] = wrong
        with pytest.raises(FasaError, match="KV head 1 selected other tokens"):
            check(layer)
        layer.indices[1, 0] = right


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_gate_with_a_wrong_output_raises(layer: Layer, factor: float) -> None:
    layer.out[HQ - 1] *= factor * 2
    with pytest.raises(FasaError, match=r"attention of KV head 1 has a relative error"):
        check(layer)


def test_bench_ops_defaults_are_the_served_ones() -> None:
    share, label_format = LABELS[DEFAULT_LABELS]
    assert share == 1 / 2 and label_format.name == "fp8"


def test_parse_choices_of_an_unknown_name_raises() -> None:
    assert parse_choices("--combine", "all", ("nrm", "mean")) == ["nrm", "mean"]
    with pytest.raises(FasaError, match="--combine must be of nrm, mean, or all, got 'max'"):
        parse_choices("--combine", "max", ("nrm", "mean"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "found no CUDA GPU"), (["--cases", "8,9"], "--cases must be BATCHxTOKENS")],
)
def test_bench_ops_without_a_gpu_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "ops", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_bench_ops_checks_and_times_a_small_case(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "ops", "--cases", "2x4096,1x1000", "--labels", "all", "--combine", "all"]
    assert main([*command, "--budget", "512"]) == 0
    assert "speed-up" in capsys.readouterr().out
