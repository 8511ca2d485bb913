"""Selectors to compare FASA with, for all lanes of a batch that ask for the same one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fasa_sglang.ops import reference


def selector_scores(
    selector: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    label_scores: Callable[[], torch.Tensor],
    head_dims: torch.Tensor,
    *,
    sm_scale: float,
    combine: str,
    seeds: list[int],
) -> torch.Tensor:
    """Rank tokens by one of ``fasa_sglang.config.SELECTORS``.

    Args:
        selector: Which one.
        q: Decode queries after RoPE, ``[B, HQ, D]``.
        k_cache: Keys after RoPE, ``[num_slots, HKV, D]``.
        slots: Position to slot, ``[B, L]``, int.
        seq_lens: Tokens of each request, ``[B]``, int.
        label_scores: FASA's own scores, ``[B, HKV, L]``; called if they are needed.
        head_dims: What each query head would read by itself, as in ``per_head_importance``.
        sm_scale: Multiplies ``q @ k``.
        combine: How a group's query heads agree.
        seeds: Of the ``random`` selector, one per request.

    Returns:
        ``[B, HKV, L]``, float32, ``-inf`` past the end.
    """
    num_kv_heads, longest = k_cache.shape[1], slots.shape[1]
    if selector == "oracle":
        return reference.oracle_importance(q, k_cache, slots, seq_lens, sm_scale=sm_scale)
    if selector == "quest":
        return reference.quest_importance(
            q, k_cache, slots, seq_lens, sm_scale=sm_scale, combine=combine
        )
    if selector == "streaming":
        return reference.streaming_importance(seq_lens, num_kv_heads, longest)
    if selector == "random":
        return reference.random_importance(seq_lens, num_kv_heads, longest, seeds=seeds)
    if selector == "per_head":
        return reference.per_head_importance(
            q, head_dims, k_cache, slots, seq_lens, sm_scale=sm_scale, combine=combine
        )
    scores = label_scores()
    return reference.page_importance(scores) if selector == "paged" else scores


def best_positions(
    scores: torch.Tensor, seq_lens: torch.Tensor, *, budget: int, sink: int, recent: int
) -> torch.Tensor:
    """What ``reference.select_tokens`` keeps, for all rows at once.

    Args:
        scores: ``[B, HKV, L]``, float32, ``-inf`` past the end.
        seq_lens: Tokens of each request, ``[B]``, int.
        budget: Tokens to keep, ``sink`` and ``recent`` among them.
        sink: First tokens that are always kept.
        recent: Last tokens that are always kept; the current one is even if this is 0.

    Returns:
        Positions, best first, ``[B, HKV, min(budget, L)]``, int64. Of a request that is shorter
        than that, those from its length on lie past its end.
    """
    position = torch.arange(scores.shape[-1], device=scores.device)
    ends = seq_lens[:, None, None]
    forced = (position < sink) | (position >= ends - max(1, recent))
    ranked = scores.masked_fill(forced & (position < ends), torch.inf)
    return ranked.argsort(dim=-1, descending=True, stable=True)[..., :budget]
