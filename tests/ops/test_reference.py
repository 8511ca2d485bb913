"""The float32 reference: FASA's algebra on awkward shapes.

Slots that no request owns hold NaN, and so does slot 0, which padding points to: reading a token
past a request's end poisons the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS, LabelFormat
from fasa_sglang.ops.layer_labels import LayerLabels

CASES = [
    # seq_lens, num_kv_heads, group, head_dim
    pytest.param((1,), 1, 1, 8, id="B1-L1-HKV1-G1-D8"),
    pytest.param((17, 5, 64), 2, 3, 16, id="B3-L64-HKV2-G3-D16"),
    pytest.param((63, 1, 2, 100), 3, 7, 32, id="B4-L100-HKV3-G7-D32"),
    pytest.param((33, 48), 8, 4, 64, id="B2-L48-HKV8-G4-D64"),
]


@dataclass
class Batch:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def sm_scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[1]

    def labels(self, dims: torch.Tensor) -> LayerLabels:
        return plain_labels(self.k_cache, dims)


# Exact labels, to test the algebra without rounding.
FLOAT32 = LabelFormat("float32", torch.float32, 32, False, None, (0, 0))


def plain_labels(k: torch.Tensor, dims: torch.Tensor) -> LayerLabels:
    """Labels of mean 0 and scale 1."""
    zeros = torch.zeros(dims.shape)
    return LayerLabels(FLOAT32.pack(k, dims, zeros, zeros + 1), dims, zeros + 1, FLOAT32)


def make_batch(
    seq_lens: tuple[int, ...], num_kv_heads: int, group: int, head_dim: int, seed: int = 0
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    num_slots = 1 + sum(seq_lens) + 10
    caches = torch.full((2, num_slots, num_kv_heads, head_dim), torch.nan)
    permuted = torch.randperm(num_slots - 1, generator=generator) + 1
    slots = torch.full((len(seq_lens), max(seq_lens)), 10**6, dtype=torch.int32)
    for b, part in enumerate(permuted[: sum(seq_lens)].split(list(seq_lens))):
        slots[b, : len(part)] = part
        caches[:, part] = torch.randn(2, len(part), num_kv_heads, head_dim, generator=generator)
    q = torch.randn(len(seq_lens), num_kv_heads * group, head_dim, generator=generator)
    return Batch(q, caches[0], caches[1], slots, torch.tensor(seq_lens))


def dense(batch: Batch) -> torch.Tensor:
    """Full attention by torch's own operator, one request at a time."""
    rows = []
    for b, seq_len in enumerate(batch.seq_lens.tolist()):
        chosen = batch.slots[b, :seq_len].long()
        k, v = (cache[chosen].transpose(0, 1) for cache in (batch.k_cache, batch.v_cache))
        out = torch.nn.functional.scaled_dot_product_attention(
            batch.q[b, :, None], k, v, enable_gqa=True
        )
        rows.append(out[:, 0])
    return torch.stack(rows)


def first_dims(batch: Batch, num_dims: int) -> torch.Tensor:
    """Different dims for every KV head: a rotated range."""
    head_dim = batch.q.shape[-1]
    return torch.stack(
        [(torch.arange(num_dims) + 3 * h) % head_dim for h in range(batch.num_kv_heads)]
    )


@pytest.mark.parametrize("combine", reference.COMBINE_RULES)
@pytest.mark.parametrize(("seq_lens", "num_kv_heads", "group", "head_dim"), CASES)
@pytest.mark.parametrize("extra", [0, 1, 50])
def test_fasa_decode_with_budget_of_at_least_the_length_is_dense(
    seq_lens: tuple[int, ...],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    combine: str,
    extra: int,
) -> None:
    batch = make_batch(seq_lens, num_kv_heads, group, head_dim)
    dims = first_dims(batch, 4)
    out = reference.fasa_decode(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        batch.labels(dims),
        batch.slots,
        batch.seq_lens,
        budget=max(seq_lens) + extra,
        sink=2,
        recent=3,
        sm_scale=batch.sm_scale,
        combine=combine,
    )
    torch.testing.assert_close(out, dense(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("seq_lens", "num_kv_heads", "group", "head_dim"), CASES)
def test_token_importance_over_all_dims_is_the_mean_logit(
    seq_lens: tuple[int, ...], num_kv_heads: int, group: int, head_dim: int
) -> None:
    batch = make_batch(seq_lens, num_kv_heads, group, head_dim)
    dims = first_dims(batch, head_dim)
    scores = reference.token_importance(
        batch.q,
        batch.labels(dims),
        batch.slots,
        batch.seq_lens,
        sm_scale=batch.sm_scale,
        combine="mean",
    )
    for b, seq_len in enumerate(seq_lens):
        # The last token is the current one: its key is stored, its label is not.
        keys = batch.k_cache[batch.slots[b, : seq_len - 1].long()]
        queries = batch.q[b].unflatten(0, (num_kv_heads, group)).mean(dim=1)
        expected = torch.einsum("hd,lhd->hl", queries, keys) * batch.sm_scale
        torch.testing.assert_close(scores[b, :, : seq_len - 1], expected, rtol=1e-4, atol=1e-5)
        assert (scores[b, :, seq_len - 1 :] == -torch.inf).all()


@pytest.mark.parametrize("label_format", LABEL_FORMATS.values(), ids=lambda f: f.name)
def test_token_importance_of_packed_labels_correlates_with_exact_scores(
    label_format: LabelFormat,
) -> None:
    """Keys far off zero and of very different sizes; the mean shifts all scores alike."""
    batch = make_batch((64,), 2, 2, 16)
    sizes = torch.logspace(-2, 2, 16)
    keys = batch.k_cache * sizes + 20 * sizes
    dims = first_dims(batch, 8)
    owned = batch.slots[0, :64].long()
    mean = keys[owned].mean(dim=0)
    scale = torch.ones(dims.shape)
    if label_format.scaled:
        scale = (keys[owned] - mean).abs().amax(dim=0).gather(-1, dims)
    packed_cache = label_format.pack(keys, dims, mean.gather(-1, dims), scale)

    def scores(labels: LayerLabels) -> torch.Tensor:
        return reference.token_importance(
            batch.q / sizes,
            labels,
            batch.slots,
            batch.seq_lens,
            sm_scale=1.0,
            combine="mean",
        )[..., :63]

    exact = scores(plain_labels(keys, dims))
    packed = scores(LayerLabels(packed_cache, dims, scale, label_format))
    exact, packed = (x - x.mean(dim=-1, keepdim=True) for x in (exact, packed))
    correlation = (exact * packed).sum(-1) / (exact.norm(dim=-1) * packed.norm(dim=-1))
    assert (correlation > 0.999).all()


@pytest.mark.parametrize(("seq_lens", "num_kv_heads", "group", "head_dim"), CASES)
def test_token_importance_reads_only_the_dominant_dims(
    seq_lens: tuple[int, ...], num_kv_heads: int, group: int, head_dim: int
) -> None:
    batch = make_batch(seq_lens, num_kv_heads, group, head_dim)
    dims = first_dims(batch, 4)
    labels = batch.labels(dims)

    def scores(q: torch.Tensor) -> torch.Tensor:
        return reference.token_importance(
            q,
            labels,
            batch.slots,
            batch.seq_lens,
            sm_scale=1.0,
            combine="nrm",
        )

    changed = batch.q.unflatten(1, (num_kv_heads, group)).clone()
    for h in range(num_kv_heads):
        others = sorted(set(range(head_dim)) - set(dims[h].tolist()))
        changed[:, h][..., others] = 1e3
    assert torch.equal(scores(changed.flatten(1, 2)), scores(batch.q))


def test_nrm_anchors_at_the_first_and_latest_tokens_and_caps_what_exceeds_them() -> None:
    scores = torch.zeros(2, 1, 100)
    scores[0, 0, [2, 30, 31, 95]] = torch.tensor([1.0, 3.0, 99.0, 2.0])
    scores[1, 0, [2, 50]] = torch.tensor([-1.0, 4.0])
    scores[1, 0, 60:] = -torch.inf
    mass = reference.combine_group(scores, "nrm")
    expected = torch.tensor([-2.0, 1.0, reference.MOST_ABOVE_ANCHORS, 0.0]).exp()
    torch.testing.assert_close(mass[0, [0, 30, 31, 95]], expected)
    torch.testing.assert_close(mass[1, [0, 2, 50]], torch.tensor([-4.0, -5.0, 0.0]).exp())
    assert (mass[1, 60:] == -torch.inf).all()


def test_nrm_sums_the_peak_normalised_mass_of_a_group() -> None:
    scores = torch.tensor([[[0.0, 1.0, -torch.inf], [5.0, 3.0, -torch.inf]]])
    expected = [
        [torch.tensor(-1.0).exp().item() + 1, 1 + torch.tensor(-2.0).exp().item(), -torch.inf]
    ]
    torch.testing.assert_close(reference.combine_group(scores, "nrm"), torch.tensor(expected))


def test_combine_group_with_an_unknown_rule_raises() -> None:
    with pytest.raises(ValueError, match="one of nrm, mean, got 'max'"):
        reference.combine_group(torch.zeros(1, 2, 3), "max")


@pytest.mark.parametrize(("seq_lens", "num_kv_heads", "group", "head_dim"), CASES)
@pytest.mark.parametrize("combine", reference.COMBINE_RULES)
def test_fasa_decode_does_not_depend_on_the_order_of_slots(
    seq_lens: tuple[int, ...], num_kv_heads: int, group: int, head_dim: int, combine: str
) -> None:
    batch = make_batch(seq_lens, num_kv_heads, group, head_dim)
    dims = first_dims(batch, 6)
    order = torch.cat([torch.tensor([0]), torch.randperm(len(batch.k_cache) - 1) + 1])
    where = order.argsort()

    def decode(permute: bool) -> torch.Tensor:
        k, v = (c[order] if permute else c for c in (batch.k_cache, batch.v_cache))
        inside = batch.slots < len(where)
        slots = torch.where(inside, where[batch.slots.clamp(max=len(where) - 1).long()], 10**6)
        return reference.fasa_decode(
            batch.q,
            k,
            v,
            plain_labels(k, dims),
            slots if permute else batch.slots,
            batch.seq_lens,
            budget=6,
            sink=1,
            recent=2,
            sm_scale=batch.sm_scale,
            combine=combine,
        )

    assert torch.equal(decode(permute=True), decode(permute=False))


@pytest.mark.parametrize("budget", [4, 5, 16, 63, 64, 65])
def test_select_tokens_includes_sink_and_recent_tokens_and_the_best(budget: int) -> None:
    seq_lens = torch.tensor([64, 3, 1, min(budget, 64)])
    scores = torch.randn(4, 2, 64)
    for b, seq_len in enumerate(seq_lens.tolist()):
        scores[b, :, seq_len:] = -torch.inf
    positions, lens = reference.select_tokens(scores, seq_lens, budget=budget, sink=1, recent=2)
    for b, seq_len in enumerate(seq_lens.tolist()):
        for h in range(2):
            selected = positions[b, h, : lens[b, h]].tolist()
            assert (positions[b, h, lens[b, h] :] == -1).all()
            assert selected == sorted(set(selected))
            assert len(selected) == min(budget, seq_len)
            forced = {0, *range(max(0, seq_len - 2), seq_len)}
            assert forced <= set(selected)
            ranked = set(selected) - forced
            left_out = set(range(seq_len)) - set(selected)
            if ranked and left_out:
                assert min(scores[b, h, list(ranked)]) >= max(scores[b, h, list(left_out)])


def test_select_tokens_breaks_ties_by_position() -> None:
    positions, _ = reference.select_tokens(
        torch.zeros(1, 1, 10), torch.tensor([10]), budget=5, sink=0, recent=1
    )
    assert positions.tolist() == [[[0, 1, 2, 3, 9]]]


def test_select_tokens_with_a_full_prefix_selects_it_on_top_of_the_budget() -> None:
    scores = torch.arange(20, dtype=torch.float32).flip(0).expand(2, 1, 20).contiguous()
    positions, lens = reference.select_tokens(
        scores,
        torch.tensor([20, 20]),
        budget=4,
        sink=2,
        recent=1,
        full_prefix_lens=torch.tensor([8, 0]),
    )
    assert positions[0, 0].tolist() == [*range(8), 8, 9, 10, 19]
    assert positions[1, 0, :4].tolist() == [0, 1, 2, 19]
    assert lens.tolist() == [[12], [4]]


def test_focused_attention_without_selected_tokens_is_zero() -> None:
    batch = make_batch((5,), 2, 2, 8)
    out = reference.focused_attention(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        batch.slots,
        torch.full((1, 2, 3), -1),
        sm_scale=batch.sm_scale,
    )
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("prefix_len", [1, 3, 4, 9])
def test_select_tokens_with_a_full_prefix_reserves_no_budget_for_a_sink(prefix_len: int) -> None:
    """The sink may be longer than the prefix: the server's default is 4, a prompt may have 1."""
    positions, lens = reference.select_tokens(
        torch.arange(30, dtype=torch.float32)[None, None],
        torch.tensor([30]),
        budget=6,
        sink=4,
        recent=2,
        full_prefix_lens=torch.tensor([prefix_len]),
    )
    # The best tokens are the last ones, so that a forced sink beyond the prefix would show.
    assert positions[0, 0].tolist() == [*range(prefix_len), *range(24, 30)]
    assert lens.tolist() == [[prefix_len + 6]]
