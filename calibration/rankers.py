"""Measures of how well each frequency chunk of a head ranks tokens.

Shape letters: ``G`` query heads of the group, ``C`` chunks of a head, ``T`` tokens, ``D``
head_dim, ``P`` sampled queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

RANKERS = ("deviation", "separation", "agreement", "covariance")


def chunk_scores(
    q: torch.Tensor, k: torch.Tensor, chunk_dims: torch.Tensor, positions: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Compute each chunk's contribution to the attention logits, one query at a time.

    Args:
        q: The sampled queries after RoPE, ``[HQ, P, D]``.
        k: ``[HKV, T, D]`` after RoPE.
        chunk_dims: Head dims of each chunk, ``[C, 2]``.
        positions: Positions of the queries, ``[P]``. As in a decode step, the query at position
            ``t`` attends to the tokens up to ``t``.

    Yields:
        For each KV head and position: the KV head, and its ``[G, C, t + 1]`` contributions,
        float32. Their sum over ``C`` is the raw logits.
    """
    groups = q.float().unflatten(0, (k.shape[0], -1))
    for head in range(k.shape[0]):
        keys = k[head].float()[:, chunk_dims]
        queries = groups[head][..., chunk_dims]
        for i, position in enumerate(positions.tolist()):
            yield (
                head,
                torch.einsum("gcx,tcx->gct", queries[:, i], keys[: position + 1]),
            )


def rank_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    chunk_dims: torch.Tensor,
    positions: torch.Tensor,
    top_k: int,
    rankers: Sequence[str] = RANKERS,
) -> dict[str, torch.Tensor]:
    """Rate every chunk of every query head, averaged over the queries.

    ``deviation``: standard deviation of the chunk's logits divided by that of the head's logits.
    It does not depend on which tokens the calibration text attends to, so it carries over to texts
    that attend elsewhere.
    ``separation``: the chunk's share of [mean logit of the true top-K] - [mean logit of all
    tokens].
    ``agreement``: overlap of the chunk's own top-K with the head's top-K, the paper's contextual
    agreement (https://arxiv.org/abs/2602.03152, Eq. 4).
    ``covariance``: the chunk's share of the variance of the logits.

    A query whose logits are all equal ranks nothing; it rates every chunk 0, or for ``agreement``
    by the arbitrary top-K of equal logits.

    Args:
        q, k, chunk_dims, positions: As in ``chunk_scores``.
        top_k: K, in tokens; at most the number of tokens that the first query attends to.
        rankers: The measures to compute, from ``RANKERS``.

    Returns:
        ``[HQ, C]`` for each ranker, float32; larger is better.
    """
    shape = (k.shape[0], q.shape[0] // k.shape[0], len(chunk_dims))
    totals = {name: torch.zeros(shape, device=k.device) for name in rankers}
    for head, scores in chunk_scores(q, k, chunk_dims, positions):
        for name, total in totals.items():
            total[head] += _MEASURES[name](scores, top_k)
    return {name: (total / len(positions)).flatten(0, 1).cpu() for name, total in totals.items()}


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """``part / whole``, and 0 where ``whole`` is 0 because all logits of a head are equal."""
    return torch.where(whole.abs() > torch.finfo(whole.dtype).tiny, part / whole, 0.0)


def _deviation(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rate the chunks for one query, like all measures: ``[G, C, T]`` to ``[G, C]``."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    full = centred.sum(dim=1, keepdim=True)
    return _ratio(centred.square().mean(dim=-1), full.square().mean(dim=-1)).sqrt()


def _separation(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    best = scores.sum(dim=1, keepdim=True).topk(top_k, dim=-1).indices
    at_best = scores.gather(-1, best.expand(-1, scores.shape[1], -1))
    separation = at_best.mean(dim=-1) - scores.mean(dim=-1)
    return _ratio(separation, separation.sum(dim=-1, keepdim=True))


def _agreement(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    full = scores.sum(dim=1, keepdim=True)
    best = full.topk(top_k, dim=-1).indices
    in_best = torch.zeros_like(full).scatter_(-1, best, 1.0)
    own_best = scores.topk(top_k, dim=-1).indices
    return in_best.expand_as(scores).gather(-1, own_best).mean(dim=-1)


def _covariance(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    centred = scores - scores.mean(dim=-1, keepdim=True)
    full = centred.sum(dim=1, keepdim=True)
    return _ratio((centred * full).mean(dim=-1), full.square().mean(dim=-1))


_MEASURES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "deviation": _deviation,
    "separation": _separation,
    "agreement": _agreement,
    "covariance": _covariance,
}


def selection_quality(
    q: torch.Tensor,
    k: torch.Tensor,
    chunk_dims: torch.Tensor,
    positions: torch.Tensor,
    top_k: int,
    ranking: torch.Tensor,
    num_fcs_grid: list[int],
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """Judge the top-K that a query head selects by its best chunks alone.

    Args:
        q, k, chunk_dims, positions, top_k: As in ``rank_statistics``.
        ranking: Chunks of each KV head, best first, ``[HKV, C]``.
        num_fcs_grid: Numbers of chunks to judge.
        sm_scale: Factor of the logits inside the softmax.

    Returns:
        Means over queries and heads, each ``[len(num_fcs_grid)]``, float32: ``agreement``, the
        overlap with the true top-K (the paper's compound CA); ``mass``, the softmax mass of the
        selected tokens; and ``oracle_mass``, that of the true top-K, an upper bound.
    """
    totals = torch.zeros(3, len(num_fcs_grid), device=k.device)
    ranking = ranking.to(k.device).long()
    for head, scores in chunk_scores(q, k, chunk_dims, positions):
        full = scores.sum(dim=1)
        best = full.topk(top_k, dim=-1).indices
        in_best = torch.zeros_like(full).scatter_(-1, best, 1.0)
        weights = (full * sm_scale).softmax(dim=-1)
        for i, num_fcs in enumerate(num_fcs_grid):
            partial = scores[:, ranking[head, :num_fcs]].sum(dim=1)
            chosen = partial.topk(top_k, dim=-1).indices
            totals[0, i] += in_best.gather(-1, chosen).mean()
            totals[1, i] += weights.gather(-1, chosen).sum(dim=-1).mean()
            totals[2, i] += weights.gather(-1, best).sum(dim=-1).mean()
    totals = (totals / (len(positions) * k.shape[0])).cpu()
    return dict(zip(("agreement", "mass", "oracle_mass"), totals, strict=True))
