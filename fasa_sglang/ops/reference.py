"""FASA in plain float32 torch: the reference of the kernels, and the CPU backend.

Shape letters, used in every docstring of this file:

    B   batch_size       HQ  num_qo_heads    D  head_dim      L  longest sequence of the batch
    F   2 * num_fcs      HKV num_kv_heads    G  HQ // HKV     N  most tokens selected by a row

A *position* counts the tokens of a request from 0; a *slot* is a row of the KV pool.
"""

from __future__ import annotations

import torch

from fasa_sglang.ops.layer_labels import LayerLabels

COMBINE_RULES = ("nrm", "mean")
# Tokens that estimate a query head's maximum score: the first 4 and the latest 12.
NUM_ANCHORS, FIRST_ANCHORS = 16, 4
# Cap on the distance of a score above its anchor, in nats.
MOST_ABOVE_ANCHORS = 30.0


def combine_group(scores: torch.Tensor, combine: str) -> torch.Tensor:
    """Reduce the scores of a group's query heads to one score per KV head.

    Args:
        scores: ``[..., G, L]``, float32, scaled like attention logits; ``-inf`` past the last
            token.
        combine: ``nrm`` sums exp(score - anchor) over the heads, ``mean`` averages the scores. A
            head's anchor is its largest score among the first ``FIRST_ANCHORS`` tokens and the
            latest ones, ``NUM_ANCHORS`` tokens in all. It approximates the maximum without a pass
            over all tokens.

    Returns:
        ``[..., L]``, float32, ``-inf`` past the last token.

    Raises:
        ValueError: ``combine`` is not one of ``COMBINE_RULES``.

    Source: ``nrm`` is LOCKS' peak-normalised mass; ``mean`` is one dot product with the mean query.
    """
    if combine == "mean":
        return scores.mean(dim=-2)
    if combine != "nrm":
        raise ValueError(f"combine must be one of {', '.join(COMBINE_RULES)}, got {combine!r}")
    past_end = scores == -torch.inf
    count = (~past_end).sum(dim=-1, keepdim=True)
    anchors = torch.arange(NUM_ANCHORS, device=scores.device).expand(*scores.shape[:-1], -1)
    anchors = torch.where(anchors < FIRST_ANCHORS, anchors, count - NUM_ANCHORS + anchors)
    anchors = anchors.clamp(min=0).minimum((count - 1).clamp(min=0))
    peak = scores.gather(-1, anchors).amax(dim=-1, keepdim=True)
    mass = (scores - peak).clamp(max=MOST_ABOVE_ANCHORS).exp().sum(dim=-2)
    return mass.masked_fill(past_end[..., 0, :], -torch.inf)


def token_importance(
    q: torch.Tensor,
    labels: LayerLabels,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
    combine: str,
) -> torch.Tensor:
    """Score every cached token with the dominant frequency chunks only: FASA's TIP.

    Args:
        q: Decode queries after RoPE, ``[B, HQ, D]``.
        labels: The layer's labels.
        slots: Position to slot, ``[B, L]``, int; entries from ``seq_lens`` on are ignored.
        seq_lens: Tokens of each request, ``[B]``, int.
        sm_scale: Multiplies ``q @ k``; matters to ``combine="nrm"``.
        combine: See ``combine_group``.

    Returns:
        ``[B, HKV, L]``, float32, ``-inf`` from ``seq_lens - 1`` on: the last token is the current
        one, which has no label yet and is always selected.

    Source: FASA, https://arxiv.org/abs/2602.03152, token importance prediction. Sharing one set of
    chunks and one ranking within a KV head is our change.
    """
    q = group_heads(q, len(labels.dims))
    q = q.gather(-1, labels.dims.long()[None, :, None, :].expand(*q.shape[:3], -1))
    rows = labels.rows(_valid_slots(slots, seq_lens))
    scores = torch.einsum("bhgf,blhf->bhgl", q, rows) * sm_scale
    return combine_group(mask_past_end(scores, seq_lens - 1), combine)


def select_tokens(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    budget: int,
    sink: int,
    recent: int,
    full_prefix_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the best tokens of every row, always including its sink and recent tokens.

    Args:
        scores: ``[B, HKV, L]``, float32, ``-inf`` past the end. Among equal scores the earlier
            token wins.
        seq_lens: Tokens of each request, ``[B]``, int.
        budget: Tokens to select, ``sink`` and ``recent`` included; all if the request is shorter.
        sink: First tokens that are always selected.
        recent: Last tokens that are always selected; the current one is even if this is 0.
        full_prefix_lens: First tokens of each request that are selected on top of the budget,
            ``[B]``, int. A request that has them reserves no budget for a sink. Default: none.

    Returns:
        Positions in rising order, ``[B, HKV, N]``, int64, padded with -1; and the number of valid
        positions of each row, ``[B, HKV]``, int64.

    Source: FASA's top-k, https://arxiv.org/abs/2602.03152; sink and recent tokens are our addition.
    """
    batch_size, num_kv_heads, _ = scores.shape
    rows = []
    for b in range(batch_size):
        seq_len = int(seq_lens[b])
        prefix_len = 0 if full_prefix_lens is None else int(full_prefix_lens[b])
        ranked = scores[b, :, :seq_len].clone()
        ranked[:, : prefix_len or sink] = torch.inf
        ranked[:, max(0, seq_len - max(1, recent)) :] = torch.inf
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        rows.append(order[:, : prefix_len + budget].sort(dim=-1).values)
    num_selected = max(row.shape[1] for row in rows)
    positions = rows[0].new_full((batch_size, num_kv_heads, num_selected), -1)
    lens = rows[0].new_empty(batch_size, num_kv_heads)
    for b, row in enumerate(rows):
        positions[b, :, : row.shape[1]] = row
        lens[b] = row.shape[1]
    return positions, lens


def focused_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    sm_scale: float,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the selected tokens only: FASA's focused attention computation (FAC).

    Args:
        q: Decode queries after RoPE, ``[B, HQ, D]``.
        k_cache: Keys after RoPE, one row per slot, ``[num_slots, HKV, D]``.
        v_cache: Values, ``[num_slots, HKV, D]``.
        slots: Position to slot, ``[B, L]``, int.
        positions: Positions to attend to, ``[B, HKV, N]``, int64, padded with -1.
        sm_scale: Multiplies ``q @ k``; usually ``D ** -0.5``.
        sink_logits: Attention sinks, ``[HQ]``: one more logit per query head, without a value.

    Returns:
        ``[B, HQ, D]``, float32. A row without a selected token is zero.

    Source: FASA, https://arxiv.org/abs/2602.03152, focused attention computation.
    """
    num_kv_heads = k_cache.shape[1]
    q = group_heads(q, num_kv_heads)
    out = torch.zeros_like(q)
    sinks = None if sink_logits is None else sink_logits.float().view(num_kv_heads, -1, 1)
    for b in range(q.shape[0]):
        for h in range(num_kv_heads):
            selected = slots[b, positions[b, h][positions[b, h] >= 0]].long()
            if len(selected):
                logits = q[b, h] @ k_cache[selected, h].float().T * sm_scale
                if sinks is not None:
                    logits = torch.cat((logits, sinks[h]), dim=-1)
                weights = logits.softmax(dim=-1)[:, : len(selected)]
                out[b, h] = weights @ v_cache[selected, h].float()
    return out.flatten(1, 2)


def fasa_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    labels: LayerLabels,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    budget: int,
    sink: int,
    recent: int,
    sm_scale: float,
    combine: str,
    full_prefix_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """One decode step of FASA: score, select, attend. Arguments as in the three steps.

    Returns:
        ``[B, HQ, D]``, float32; equal to dense attention where ``budget`` covers the request.
    """
    scores = token_importance(q, labels, slots, seq_lens, sm_scale=sm_scale, combine=combine)
    positions, _ = select_tokens(
        scores,
        seq_lens,
        budget=budget,
        sink=sink,
        recent=recent,
        full_prefix_lens=full_prefix_lens,
    )
    return focused_attention(q, k_cache, v_cache, slots, positions, sm_scale=sm_scale)


def group_heads(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[B, HQ, D]`` to ``[B, HKV, G, D]``, float32."""
    return q.float().unflatten(1, (num_kv_heads, -1))


def attention_logits(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """Attention logits over the whole head; arguments as in ``focused_attention``.

    Returns:
        ``[B, HKV, G, L]``, float32, ``-inf`` past the end.
    """
    keys = k_cache[_valid_slots(slots, seq_lens)].float()
    logits = torch.einsum("bhgd,blhd->bhgl", group_heads(q, k_cache.shape[1]), keys) * sm_scale
    return mask_past_end(logits, seq_lens)


def mask_past_end(scores: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Write ``-inf`` from ``seq_lens`` on; ``scores`` is ``[B, ..., L]``."""
    past_end = _past_end(scores.shape[-1], seq_lens)
    middle = (1,) * (scores.dim() - 2)
    return scores.masked_fill(past_end.view(len(seq_lens), *middle, -1), -torch.inf)


def _valid_slots(slots: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """``slots`` with slot 0 past each request's end, so that any padding can be gathered."""
    return slots.long().masked_fill(_past_end(slots.shape[1], seq_lens), 0)


def _past_end(max_len: int, seq_lens: torch.Tensor) -> torch.Tensor:
    return torch.arange(max_len, device=seq_lens.device) >= seq_lens[:, None]
