"""What every label format promises, for each entry of the registry."""

from __future__ import annotations

import pytest
import torch

from fasa_sglang.ops.label_format import LABEL_FORMATS, LabelFormat
from fasa_sglang.ops.layer_labels import LayerLabels

FORMATS = pytest.mark.parametrize("label_format", LABEL_FORMATS.values(), ids=lambda f: f.name)
DIMS = torch.tensor([[5, 0, 3, 2], [1, 7, 6, 4]])


def keys(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, 2, 8, generator=torch.Generator().manual_seed(0))


@FORMATS
def test_unpack_returns_the_packed_differences_up_to_rounding(label_format: LabelFormat) -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(DIMS.shape, generator=generator)
    scale = torch.rand(DIMS.shape, generator=generator) + 0.5
    k = keys(50)
    labels = label_format.pack(k, DIMS, mean, scale)
    assert labels.shape == (50, 2, 4) and labels.dtype == label_format.dtype
    expected = k.gather(-1, DIMS.expand(50, -1, -1)) - mean
    half_step = torch.finfo(label_format.dtype).eps / 2
    torch.testing.assert_close(
        label_format.unpack(labels, scale), expected, rtol=1.01 * half_step, atol=2e-3
    )


@FORMATS
def test_pack_of_values_beyond_the_format_stays_finite(label_format: LabelFormat) -> None:
    k = torch.full((1, 2, 8), 1e4) * torch.tensor([1.0, -1.0])[:, None]
    labels = label_format.pack(k, DIMS, torch.zeros(DIMS.shape), torch.ones(DIMS.shape)).float()
    assert labels.isfinite().all()
    assert (labels[0, 0] >= 400).all() and (labels[0, 1] <= -400).all()


@FORMATS
def test_empty_cache_has_the_bytes_that_sizing_counts(label_format: LabelFormat) -> None:
    cache = label_format.empty_cache(3, 10, 2, 5, torch.device("cpu"))
    assert cache.shape == (3, 10, 2, 10) and not cache.float().any()
    assert cache[0, 0, 0].nbytes == label_format.row_bytes(5)
    assert cache.nbytes == 10 * label_format.bytes_per_token(3, 2, 5)


@FORMATS
def test_store_and_read_address_the_same_slots(label_format: LabelFormat) -> None:
    cache = label_format.empty_cache(1, 10, 2, 2, torch.device("cpu"))[0]
    ones = torch.ones(DIMS.shape)
    labels = label_format.pack(keys(3), DIMS, 0 * ones, ones)
    slots = torch.tensor([7, 1, 4])
    label_format.store(cache, slots, labels)
    assert torch.equal(label_format.read(cache, slots).float(), labels.float())
    layer = LayerLabels(cache, DIMS.int(), 3 * ones, label_format)
    assert torch.equal(layer.rows(slots[[2, 0]]), 3 * labels[[2, 0]].float())
    others = torch.tensor([0, 2, 3, 5, 6, 8, 9])
    assert not label_format.read(cache, others).float().any()
