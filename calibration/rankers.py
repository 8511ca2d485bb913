"""How well each frequency chunk of a KV head ranks tokens, by four measures.

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
    """Each chunk's share of the attention logits, query by query, as a decode step sees them.

    Args:
        q: ``[HQ, T, D]`` after RoPE.
        k: ``[HKV, T, D]`` after RoPE.
        chunk_dims: Head dims of each chunk, ``[C, 2]``.
        positions: Queries to look at, ``[P]``; query ``t`` sees the tokens up to ``t``.

    Yields:
        KV head, and ``[G, C, t + 1]`` float32; summed over ``C`` these are the raw logits.
    """
    groups = q.float().unflatten(0, (k.shape[0], -1))
    for head in range(k.shape[0]):
        keys = k[head].float()[:, chunk_dims]
        queries = groups[head][:, positions][..., chunk_dims]
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
    """Each ranker's value of every chunk for every query head, averaged over queries.

    ``deviation``: standard deviation of the chunk's logits over that of the head's. What the text
    attends to does not enter, so it carries over to texts that attend to something else.
    ``separation``: share of [mean logit of the true top-K] - [mean logit of all tokens].
    ``agreement``: overlap of the chunk's own top-K with the head's, the paper's contextual
    agreement (https://arxiv.org/abs/2602.03152, Eq. 4).
    ``covariance``: share of the logits' variance that varies with the chunk.

    Args:
        q, k, chunk_dims, positions: As in ``chunk_scores``.
        top_k: Tokens a query attends to; every position must see more.
        rankers: Which of ``RANKERS``.

    Returns:
        Ranker to ``[HQ, C]``, float32; larger is better.
    """
    shape = (k.shape[0], q.shape[0] // k.shape[0], len(chunk_dims))
    totals = {name: torch.zeros(shape, device=k.device) for name in rankers}
    for head, scores in chunk_scores(q, k, chunk_dims, positions):
        for name, total in totals.items():
            total[head] += _MEASURES[name](scores, top_k)
    return {name: (total / len(positions)).flatten(0, 1).cpu() for name, total in totals.items()}


def _deviation(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """``[G, C]`` of one query's ``[G, C, T]``, as the other measures."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    full = centred.sum(dim=1, keepdim=True)
    return (centred.square().mean(dim=-1) / full.square().mean(dim=-1)).sqrt()


def _separation(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    best = scores.sum(dim=1, keepdim=True).topk(top_k, dim=-1).indices
    at_best = scores.gather(-1, best.expand(-1, scores.shape[1], -1))
    separation = at_best.mean(dim=-1) - scores.mean(dim=-1)
    return separation / separation.sum(dim=-1, keepdim=True)


def _agreement(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    full = scores.sum(dim=1, keepdim=True)
    best = full.topk(top_k, dim=-1).indices
    in_best = torch.zeros_like(full).scatter_(-1, best, 1.0)
    own_best = scores.topk(top_k, dim=-1).indices
    return in_best.expand_as(scores).gather(-1, own_best).mean(dim=-1)


def _covariance(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    centred = scores - scores.mean(dim=-1, keepdim=True)
    full = centred.sum(dim=1, keepdim=True)
    return (centred * full).mean(dim=-1) / full.square().mean(dim=-1)


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
    """What a query head's top-K by the best chunks alone is worth, for several numbers of chunks.

    Args:
        q, k, chunk_dims, positions, top_k: As in ``rank_statistics``.
        ranking: Chunks of each KV head, best first, ``[HKV, C]``.
        num_fcs_grid: Numbers of chunks to try.
        sm_scale: Scale of the logits under the softmax.

    Returns:
        Means over queries and heads, ``[len(num_fcs_grid)]`` float32: ``agreement``, the overlap
        with the true top-K (compound CA); ``mass``, the softmax mass it holds; and
        ``oracle_mass``, the most that K tokens hold.
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
