"""The label cache: labels of all selecting layers, made from the KV pool."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fasa_sglang.backend.attention.label_cache import LabelCache
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.layer_plan import LayerKind, LayerPlan
from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS, LabelFormat
from fasa_sglang.rope import Rotation
from shapes import make_shape

NUM_LAYERS, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_FCS = 5, 4, 2, 16, 3


def make_dominant(layers: tuple[int, ...] = (0, 1, 2, 3, 4), seed: int = 0) -> DominantFCs:
    generator = torch.Generator().manual_seed(seed)
    shape = make_shape(
        NUM_LAYERS, NUM_QO_HEADS, NUM_KV_HEADS, Rotation.neox(HEAD_DIM), layers=layers
    )
    heads, chunks = (len(layers), NUM_KV_HEADS), HEAD_DIM // 2
    return DominantFCs(
        model=shape,
        num_fcs=NUM_FCS,
        ranking=torch.rand(*heads, chunks, generator=generator).argsort(dim=-1).to(torch.int16),
        score=torch.rand(len(layers), NUM_QO_HEADS, chunks, generator=generator),
        k_mean=torch.randn(*heads, HEAD_DIM, generator=generator),
        k_scale=torch.rand(*heads, HEAD_DIM, generator=generator) + 0.5,
    )


def make_cache(
    k_buffers: Mapping[int, torch.Tensor], label_format: LabelFormat, num_slots: int
) -> LabelCache:
    return LabelCache(
        k_buffers,
        num_slots,
        NUM_KV_HEADS,
        NUM_QO_HEADS,
        HEAD_DIM,
        NUM_FCS,
        label_format,
        "cpu",
    )


FORMATS = pytest.mark.parametrize("label_format", LABEL_FORMATS.values(), ids=lambda f: f.name)


def make_keys(layers: list[int], num_slots: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (num_slots, NUM_KV_HEADS, HEAD_DIM)
    return {layer: torch.randn(shape, generator=generator) for layer in layers}


def assert_labels(
    cache: LabelCache,
    dominant: DominantFCs,
    k_buffers: Mapping[int, torch.Tensor],
    slots: torch.Tensor,
    label_format: LabelFormat,
) -> None:
    """The labels in ``slots`` of all layers are those of a calibration that ranks these layers."""
    dims, head_dims = dominant.dims(NUM_FCS), dominant.head_dims(NUM_FCS)
    for layer, keys in k_buffers.items():
        [row] = dominant.rows([layer])
        labels = cache.layer(layer)
        assert torch.equal(labels.dims.long(), dims[row])
        assert torch.equal(cache.head_dims(layer), head_dims[row])
        chosen = keys[slots].gather(-1, dims[row].expand(len(slots), -1, -1))
        centred = chosen - dominant.k_mean[row].gather(-1, dims[row])
        half_step = torch.finfo(label_format.dtype).eps / 2
        assert ((labels.rows(slots) - centred).abs() <= half_step * centred.abs() + 1e-3).all()


@FORMATS
def test_write_labels_the_selecting_layers_of_a_pipeline_stage(label_format: LabelFormat) -> None:
    """Layers 3 and 4 alone, by the rows of the calibration that belong to them.

    Written slots only; the others stay zero.
    """
    dominant, num_slots = make_dominant(), 12
    k_buffers = make_keys([3, 4], num_slots)
    cache = make_cache(k_buffers, label_format, num_slots)
    assert cache.labels.shape == (2, num_slots, NUM_KV_HEADS, 2 * NUM_FCS)
    cache.use(dominant)
    slots = torch.tensor([7, 3, 11])
    cache.write(slots)
    assert_labels(cache, dominant, k_buffers, slots, label_format)
    others = [slot for slot in range(num_slots) if slot not in slots]
    for layer in k_buffers:
        assert not cache.layer(layer).rows(torch.tensor(others)).any()


@FORMATS
def test_use_of_a_calibration_of_some_layers_takes_their_rows(label_format: LabelFormat) -> None:
    """Layer 1 is not calibrated; the labels of the other layers are not shifted by one row."""
    dominant, num_slots = make_dominant(layers=(0, 2, 4)), 12
    k_buffers = make_keys([0, 1, 2, 4], num_slots)
    cache = make_cache(k_buffers, label_format, num_slots)
    cache.use(dominant)
    slots = torch.arange(num_slots)
    cache.write(slots)
    ranked = {layer: keys for layer, keys in k_buffers.items() if layer != 1}
    assert_labels(cache, dominant, ranked, slots, label_format)
    assert cache.layer(1).rows(slots).isfinite().all()
    assert not cache.head_dims(1).any()


@FORMATS
def test_use_of_another_calibration_replaces_the_first_in_place(label_format: LabelFormat) -> None:
    """Captured CUDA graphs read the buffers from where they were; a first write did no harm."""
    num_slots = 12
    k_buffers = make_keys([0, 1], num_slots)
    cache = make_cache(k_buffers, label_format, num_slots)
    slots = torch.arange(num_slots)
    cache.write(slots)
    assert cache.labels.float().isfinite().all()
    cache.use(make_dominant(seed=5))
    labels, head_dims = cache.layer(1), cache.head_dims(1)
    cache.use(make_dominant())
    cache.write(slots)
    assert_labels(cache, make_dominant(), k_buffers, slots, label_format)
    assert torch.equal(labels.dims, cache.layer(1).dims)
    assert torch.equal(labels.rows(slots), cache.layer(1).rows(slots))
    assert head_dims.data_ptr() == cache.head_dims(1).data_ptr()


@FORMATS
def test_labels_of_keys_with_large_biases_keep_their_resolution(label_format: LabelFormat) -> None:
    """Some models add large biases to their keys; only what differs from the mean ranks tokens.

    Without the mean a bf16 label at a bias of 300 has steps of 2, and the kernels' float16 scores
    have steps of 0.25.
    """
    dominant, num_slots = make_dominant(), 200
    dominant.k_mean.copy_(300 * dominant.k_mean.sign())
    dominant.k_scale.fill_(1.0)
    centred = make_keys([0], num_slots)[0]
    cache = make_cache({0: centred + dominant.k_mean[0]}, label_format, num_slots)
    cache.use(dominant)
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
    cache = make_cache(make_keys([0], 4), LABEL_FORMATS["fp8"], 4)
    cache.use(dominant)
    cache.write(torch.tensor([1, 2]))
    assert cache.labels.float().isfinite().all()


def test_stage_without_selecting_layers_has_no_labels() -> None:
    cache = make_cache({}, LABEL_FORMATS["fp8"], 4)
    cache.use(make_dominant())
    cache.write(torch.tensor([1, 2]))
    assert cache.labels.nbytes == 0


@FORMATS
def test_bytes_per_token_equals_what_is_allocated(label_format: LabelFormat) -> None:
    plan = LayerPlan.of_model([LayerKind.SELECTS] * NUM_LAYERS, num_dense_layers=1)
    cache = make_cache(make_keys(plan.selecting, 10), label_format, 10)
    per_token = label_format.bytes_per_token(len(plan.selecting), NUM_KV_HEADS, NUM_FCS)
    assert cache.labels.nbytes == 10 * per_token
