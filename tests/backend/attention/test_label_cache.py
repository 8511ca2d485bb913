"""The label cache: labels of all selecting layers, made from the KV pool."""

from __future__ import annotations

import pytest
import torch

from fasa_sglang.backend.attention.label_cache import LabelCache
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.layer_plan import LayerPlan
from fasa_sglang.model_shape import ModelShape
from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS, LabelFormat
from fasa_sglang.rope import RopeLayout

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, NUM_FCS = 5, 2, 16, 3


def make_dominant() -> DominantFCs:
    generator = torch.Generator().manual_seed(0)
    rope = RopeLayout(HEAD_DIM, HEAD_DIM, interleaved=False, theta=1e4)
    heads = (NUM_LAYERS, NUM_KV_HEADS)
    ranking = torch.rand(*heads, HEAD_DIM // 2, generator=generator).argsort(dim=-1)
    return DominantFCs(
        ModelShape("TestForCausalLM", NUM_LAYERS, 4, NUM_KV_HEADS, rope),
        NUM_FCS,
        ranking.to(torch.int16),
        torch.zeros(*heads, HEAD_DIM // 2),
        torch.randn(*heads, HEAD_DIM, generator=generator),
        torch.rand(*heads, HEAD_DIM, generator=generator) + 0.5,
    )


FORMATS = pytest.mark.parametrize("label_format", LABEL_FORMATS.values(), ids=lambda f: f.name)


def make_keys(num_layers: int, num_slots: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (num_slots, NUM_KV_HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator) for _ in range(num_layers)]


@FORMATS
def test_write_labels_the_selecting_layers_of_a_pipeline_stage(label_format: LabelFormat) -> None:
    """Layers 2 to 4, of which 2 is dense; written slots only, the others stay zero."""
    dominant, num_slots = make_dominant(), 12
    plan = LayerPlan.of_model(NUM_LAYERS, 3).stage(2, 3)
    k_buffers = make_keys(3, num_slots)
    cache = LabelCache(k_buffers, dominant, plan, NUM_FCS, label_format)
    assert cache.labels.shape == (2, num_slots, NUM_KV_HEADS, 2 * NUM_FCS)
    slots = torch.tensor([7, 3, 11])
    cache.write(slots)
    dims, head_dims = dominant.dims(NUM_FCS), dominant.head_dims(NUM_FCS)
    for layer in (3, 4):
        labels = cache.layer(layer)
        assert torch.equal(labels.dims.long(), dims[layer])
        assert torch.equal(cache.head_dims(layer), head_dims[layer])
        mean = dominant.k_mean[layer].gather(-1, dims[layer])
        keys = k_buffers[layer - 2].gather(-1, dims[layer].expand(num_slots, -1, -1)) - mean
        half_step = torch.finfo(label_format.dtype).eps / 2
        allowed = half_step * keys.abs() + 1e-3
        assert ((labels.rows(slots) - keys[slots]).abs() <= allowed[slots]).all()
        others = [slot for slot in range(num_slots) if slot not in slots]
        assert not labels.rows(torch.tensor(others)).any()


@FORMATS
def test_labels_of_keys_with_large_biases_keep_their_resolution(label_format: LabelFormat) -> None:
    """Some models add large biases to their keys; only what differs from the mean ranks tokens.

    Without the mean a bf16 label at a bias of 300 has steps of 2, and the kernels' float16 scores
    have steps of 0.25.
    """
    dominant, num_slots = make_dominant(), 200
    dominant.k_mean.copy_(300 * dominant.k_mean.sign())
    dominant.k_scale.fill_(1.0)
    [centred] = make_keys(1, num_slots)
    plan = LayerPlan.of_model(NUM_LAYERS, 0).stage(0, 1)
    cache = LabelCache([centred + dominant.k_mean[0]], dominant, plan, NUM_FCS, label_format)
    slots = torch.arange(num_slots)
    cache.write(slots)
    q = torch.randn(1, 4, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    labels = cache.layer(0)
    scores = reference.token_importance(
        q, labels, slots[None], torch.tensor([num_slots]), sm_scale=0.25, combine="mean"
    )[0, :, :-1]
    dims = labels.dims.long()
    mean_q = reference.group_heads(q, NUM_KV_HEADS)[0].mean(dim=1).gather(-1, dims)
    keys = centred.gather(-1, dims.expand(num_slots, -1, -1))[:-1]
    exact = torch.einsum("hf,lhf->hl", mean_q, keys) * 0.25
    error = (scores.half().float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert (error < max(torch.finfo(label_format.dtype).eps / 2, 0.006)).all()


def test_dims_without_spread_are_not_divided_by_zero() -> None:
    dominant = make_dominant()
    dominant.k_scale.zero_()
    plan = LayerPlan.of_model(NUM_LAYERS, 0).stage(0, 1)
    cache = LabelCache(make_keys(1, 4), dominant, plan, NUM_FCS, LABEL_FORMATS["fp8"])
    cache.write(torch.tensor([1, 2]))
    assert cache.labels.float().isfinite().all()


def test_stage_without_selecting_layers_has_no_labels() -> None:
    plan = LayerPlan.of_model(NUM_LAYERS, 2).stage(0, 2)
    cache = LabelCache(make_keys(2, 4), make_dominant(), plan, NUM_FCS, LABEL_FORMATS["fp8"])
    cache.write(torch.tensor([1, 2]))
    assert cache.labels.nbytes == 0


@FORMATS
def test_bytes_per_token_equals_what_is_allocated(label_format: LabelFormat) -> None:
    plan = LayerPlan.of_model(NUM_LAYERS, 1)
    cache = LabelCache(make_keys(NUM_LAYERS, 10), make_dominant(), plan, NUM_FCS, label_format)
    per_token = label_format.bytes_per_token(len(plan.selecting), NUM_KV_HEADS, NUM_FCS)
    assert cache.labels.nbytes == 10 * per_token
