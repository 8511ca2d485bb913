"""Labels are read from the KV pool, all layers at once."""

from __future__ import annotations

import pytest
import torch

from fasa_sglang.backend.attention.label_cache import LabelCache
from fasa_sglang.dominant_fcs import DominantFCs, ModelShape
from fasa_sglang.ops import reference
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


@pytest.mark.parametrize("label_dtype", sorted(LABEL_DTYPES))
def test_new_slots_of_all_layers_are_labelled(label_dtype: str) -> None:
    """A pipeline stage holds the layers from 2 on; written slots only, the others stay zero."""
    dominant, first_layer, num_slots = make_dominant(), 2, 12
    k_buffers = [torch.randn(num_slots, NUM_KV_HEADS, HEAD_DIM) for _ in range(3)]
    cache = LabelCache(k_buffers, dominant, first_layer, NUM_FCS, label_dtype)
    slots = torch.tensor([7, 3, 11])
    cache.write(slots)
    dims = dominant.dims(NUM_FCS)
    for local in range(3):
        layer = first_layer + local
        keys = k_buffers[local].gather(-1, dims[layer].expand(num_slots, -1, -1))
        read = cache.labels[local].float() * cache.scale[local] + cache.mean[local]
        # Half of float8's step of 1/8, or of bfloat16's of 1/128, of what is stored.
        step = 1 / 16 if label_dtype == "fp8" else 1 / 256
        allowed = step * (keys - cache.mean[local]).abs() + 1e-3
        assert ((read - keys).abs() <= allowed)[slots].all()
        others = torch.ones(num_slots, dtype=torch.bool)
        others[slots] = False
        assert (cache.labels[local].float()[others] == 0).all()
    scored = reference.token_importance(
        torch.randn(1, 4, HEAD_DIM),
        cache.labels[0],
        cache.dims[0].long(),
        cache.scale[0],
        slots[None],
        torch.tensor([3]),
        sm_scale=1.0,
        combine="mean",
    )
    assert scored[0, :, :2].isfinite().all()


def test_dims_that_never_moved_do_not_divide_by_zero() -> None:
    dominant = make_dominant()
    dominant.k_scale.zero_()
    cache = LabelCache([torch.randn(4, NUM_KV_HEADS, HEAD_DIM)], dominant, 0, NUM_FCS, "fp8")
    cache.write(torch.tensor([1, 2]))
    assert cache.labels.float().isfinite().all()


def test_bytes_per_token_count_what_is_allocated() -> None:
    k_buffers = [torch.zeros(10, NUM_KV_HEADS, HEAD_DIM) for _ in range(NUM_LAYERS)]
    for label_dtype in LABEL_DTYPES:
        cache = LabelCache(k_buffers, make_dominant(), 0, NUM_FCS, label_dtype)
        per_token = label_bytes_per_token(NUM_LAYERS, NUM_KV_HEADS, NUM_FCS, label_dtype)
        assert cache.labels.nbytes == 10 * per_token
