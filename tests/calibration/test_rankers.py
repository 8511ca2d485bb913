"""The rankers against their definitions, computed one query and one chunk at a time."""

from __future__ import annotations

import pytest
import torch

from fasa_sglang.calibration.rankers import (
    RANKERS,
    chunk_scores,
    rank_statistics,
    selection_quality,
)
from fasa_sglang.rope import Rotation

HQ, HKV, T, D, TOP_K = 4, 2, 60, 16, 8
DIMS = Rotation.neox(D).chunk_dims()
POSITIONS = torch.tensor([30, 41, 59])
P = len(POSITIONS)


def random_qk() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries at the sampled positions, and the keys of all tokens."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(D, generator=generator) * 2
    return (
        torch.randn(HQ, P, D, generator=generator) * scale,
        torch.randn(HKV, T, D, generator=generator),
    )


def test_chunk_scores_summed_over_chunks_are_the_logits() -> None:
    q, k = random_qk()
    seen = list(chunk_scores(q, k, DIMS, POSITIONS))
    assert [head for head, _ in seen] == [0, 0, 0, 1, 1, 1]
    _, scores = seen[4]
    expected = q[2:, 1] @ k[1, :42].T
    torch.testing.assert_close(scores.sum(dim=1), expected, rtol=1e-4, atol=1e-4)


def test_rank_statistics_equal_their_definitions() -> None:
    q, k = random_qk()
    got = rank_statistics(q, k, DIMS, POSITIONS, TOP_K)
    for head in range(HQ):
        for chunk in range(D // 2):
            values: dict[str, list[float]] = {name: [] for name in got}
            for i, t in enumerate(POSITIONS.tolist()):
                keys, query = k[head // 2, : t + 1].double(), q[head, i].double()
                part = keys[:, DIMS[chunk]] @ query[DIMS[chunk]]
                full = keys @ query
                best = set(full.topk(TOP_K).indices.tolist())
                own = set(part.topk(TOP_K).indices.tolist())
                values["agreement"].append(len(best & own) / TOP_K)
                index = sorted(best)
                values["separation"].append(
                    float((part[index].mean() - part.mean()) / (full[index].mean() - full.mean()))
                )
                centred, spread = part - part.mean(), full - full.mean()
                values["covariance"].append(
                    float((centred * spread).mean() / spread.square().mean())
                )
                values["deviation"].append(float(part.std() / full.std()))
            for name, parts in values.items():
                expected = sum(parts) / len(parts)
                assert abs(got[name][head, chunk].item() - expected) < 1e-4, name


def test_rank_statistics_that_are_shares_sum_to_one() -> None:
    q, k = random_qk()
    got = rank_statistics(q, k, DIMS, POSITIONS, TOP_K)
    for name in ("separation", "covariance"):
        torch.testing.assert_close(got[name].sum(dim=-1), torch.ones(HQ), rtol=1e-4, atol=1e-4)


def test_selection_quality_of_all_chunks_equals_the_true_top_k() -> None:
    q, k = random_qk()
    ranking = torch.arange(D // 2).expand(HKV, -1)
    quality = selection_quality(q, k, DIMS, POSITIONS, TOP_K, ranking, [1, D // 2], D**-0.5)
    assert quality["agreement"][1] == 1
    torch.testing.assert_close(quality["mass"][1], quality["oracle_mass"][1])
    assert quality["agreement"][0] < 1
    assert quality["mass"][0] < quality["oracle_mass"][0]


@pytest.mark.parametrize("padded", ["query", "key", "both"])
@pytest.mark.parametrize("ranker", RANKERS)
def test_rank_statistics_of_a_zero_padded_head_are_finite(ranker: str, padded: str) -> None:
    """Constant logits have no spread to divide by; the other heads' values stay as they are."""
    q, k = random_qk()
    expected = rank_statistics(q, k, DIMS, POSITIONS, TOP_K, [ranker])[ranker]
    if padded != "key":
        q[3] = 0
    if padded != "query":
        k[1] = 0
    got = rank_statistics(q, k, DIMS, POSITIONS, TOP_K, [ranker])[ranker]
    assert torch.isfinite(got).all()
    assert torch.equal(got[:2], expected[:2])
    if ranker != "agreement":
        assert (got[3] == 0).all()
