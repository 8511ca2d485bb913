"""The rule of each selector, on data whose right answer is known."""

from __future__ import annotations

import torch

from fasa_sglang.ops import reference
from fasa_sglang.selectors import SELECTORS, DecodeView


def never() -> torch.Tensor:
    raise AssertionError("this selector does not read labels")


def make_view(
    seq_lens: tuple[int, ...],
    num_kv_heads: int = 2,
    group: int = 1,
    head_dim: int = 16,
    combine: str = "mean",
    seeds: list[int] | None = None,
    max_len: int | None = None,
) -> DecodeView:
    """Random queries and keys; each request has the slots that follow those of the one before."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.zeros(len(seq_lens), max_len or max(seq_lens), dtype=torch.int64)
    for b, length in enumerate(seq_lens):
        slots[b, :length] = torch.arange(length) + sum(seq_lens[:b])
    num_qo_heads = num_kv_heads * group
    return DecodeView(
        q=torch.randn(len(seq_lens), num_qo_heads, head_dim, generator=generator),
        k_cache=torch.randn(sum(seq_lens), num_kv_heads, head_dim, generator=generator),
        slots=slots,
        seq_lens=torch.tensor(seq_lens),
        label_scores=never,
        head_dims=torch.ones(num_qo_heads, head_dim),
        sm_scale=head_dim**-0.5,
        combine=combine,
        seeds=seeds or [0] * len(seq_lens),
    )


def own_keys(view: DecodeView, b: int) -> torch.Tensor:
    """``[seq_len, HKV, D]``."""
    return view.k_cache[view.slots[b, : int(view.seq_lens[b])]]


def test_fasa_returns_the_label_scores() -> None:
    view = make_view((4,))
    scores = torch.randn(1, 2, 4)
    view = DecodeView(**{**vars(view), "label_scores": lambda: scores})
    assert SELECTORS["fasa"].scores(view) is scores


def test_oracle_sums_the_softmax_weights_of_a_group() -> None:
    view = make_view((17, 5), group=3)
    scores = SELECTORS["oracle"].scores(view)
    assert (scores[1, :, 5:] == -torch.inf).all()
    # The weights of a head sum to 1, those of a group to its size.
    torch.testing.assert_close(scores[0].sum(dim=-1), torch.full((2,), 3.0))
    weights = (view.q[1, 3:] @ own_keys(view, 1)[:, 1].T * view.sm_scale).softmax(dim=-1)
    torch.testing.assert_close(scores[1, 1, :5], weights.sum(dim=0))


def test_quest_bounds_every_token_and_ties_within_pages() -> None:
    view = make_view((50, 16))
    scores = SELECTORS["quest"].scores(view)
    for b, seq_len in enumerate((50, 16)):
        logits = torch.einsum("hd,lhd->hl", view.q[b], own_keys(view, b)) * view.sm_scale
        assert (scores[b, :, :seq_len] >= logits - 1e-5).all()
        for page in scores[b, :, :seq_len].split(16, dim=-1):
            assert (page == page[:, :1]).all()
        # The bound is of the page's own keys: no looser than the sum of the dims' maxima.
        first = own_keys(view, b)[:16]
        bound = torch.maximum(view.q[b] * first.amax(dim=0), view.q[b] * first.amin(dim=0))
        torch.testing.assert_close(scores[b, :, 0], bound.sum(dim=-1) * view.sm_scale)
        assert (scores[b, :, seq_len:] == -torch.inf).all()


def test_paged_gives_every_token_the_best_score_of_its_page() -> None:
    scores = torch.arange(40, dtype=torch.float32).repeat(1, 1, 1)
    scores[0, 0, 3], scores[0, 0, 38:] = 99, -torch.inf
    view = DecodeView(**{**vars(make_view((38,), max_len=40)), "label_scores": lambda: scores})
    paged = SELECTORS["paged"].scores(view)[0, 0]
    assert paged[:16].eq(99).all() and paged[16:32].eq(31).all() and paged[32:38].eq(37).all()
    assert paged[38:].eq(-torch.inf).all()


def test_per_head_reads_the_dims_of_each_query_head() -> None:
    head_dims = (torch.arange(6 * 16).view(6, 16) % 5 < 2).float()
    view = DecodeView(**{**vars(make_view((50, 16), group=3)), "head_dims": head_dims})
    scores = SELECTORS["per_head"].scores(view)
    for b, seq_len in enumerate((50, 16)):
        for head in range(2):
            keys = own_keys(view, b)[:, head]
            logits = [
                keys[:, head_dims[h].bool()] @ view.q[b, h, head_dims[h].bool()]
                for h in range(3 * head, 3 * head + 3)
            ]
            expected = torch.stack(logits).mean(dim=0) * view.sm_scale
            torch.testing.assert_close(scores[b, head, :seq_len], expected, rtol=1e-4, atol=1e-5)
        assert (scores[b, :, seq_len:] == -torch.inf).all()


def test_streaming_selects_the_sink_and_the_newest_tokens() -> None:
    view = make_view((30, 12))
    positions, _ = reference.select_tokens(
        SELECTORS["streaming"].scores(view), view.seq_lens, budget=6, sink=2, recent=1
    )
    assert positions[0, 1].tolist() == [0, 1, 26, 27, 28, 29]
    assert positions[1, 0].tolist() == [0, 1, 8, 9, 10, 11]


def test_random_depends_on_the_seed_alone() -> None:
    random = SELECTORS["random"]
    [alone] = random.scores(make_view((4000,), seeds=[-7]))
    view = make_view((90, 4000, 4000), seeds=[1, -7, 2], max_len=4100)
    first, second, third = random.scores(view)
    assert torch.equal(second[:, :4000], alone)
    assert (second[:, 4000:] == -torch.inf).all() and (first[:, 90:] == -torch.inf).all()
    # Requests, KV heads and neighbouring tokens are uncorrelated.
    rows = torch.stack([alone[0], alone[1], third[0, :4000], alone[0].roll(1)])
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 0.06
    # No part of a request is preferred.
    positions = alone.topk(1000).indices.float()
    assert ((positions.mean(dim=-1) / 2000 - 1).abs() < 0.06).all()
