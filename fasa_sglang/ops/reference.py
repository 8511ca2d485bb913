"""FASA in plain float32 torch: what the kernels are tested against and the CPU backend runs.

Shape letters, used in every docstring of this file:

    B   batch_size       HQ  num_qo_heads    D  head_dim      L  longest sequence of the batch
    F   2 * num_fcs      HKV num_kv_heads    G  HQ // HKV     N  most tokens selected by a row

A *position* counts the tokens of a request from 0; a *slot* is a row of the KV pool.
"""

from __future__ import annotations

import torch

COMBINE_RULES = ("nrm", "mean")
QUEST_PAGE_SIZE = 16
# Tokens whose scores tell how high those of a query head go: the first ones and the latest.
NUM_ANCHORS, FIRST_ANCHORS = 16, 4
# What a score above all of these counts for at most, in nats.
MOST_ABOVE_ANCHORS = 30.0
# Largest value of float8_e4m3fn.
FP8_MAX = 448.0


def pack_labels(
    k: torch.Tensor,
    dominant_dims: torch.Tensor,
    label_mean: torch.Tensor,
    label_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gather the dominant dims of every key: one packed row of the label cache per token.

    A label is relative to the calibration's mean and scale of its dim. The mean shifts all scores
    of a query alike, which no ranking notices, and the scale moves into the query, so that
    reading a label costs neither.

    Args:
        k: Keys after RoPE, ``[num_tokens, HKV, D]``.
        dominant_dims: Head dims of the dominant FCs, ``[HKV, F]``, int64.
        label_mean: Subtracted before packing, ``[HKV, F]``, float32.
        label_scale: Divides what is left, ``[HKV, F]``, float32.
        dtype: Of the label cache; float8_e4m3fn saturates at ``FP8_MAX``.

    Returns:
        ``[num_tokens, HKV, F]``, ``dtype``.
    """
    labels = k.gather(-1, dominant_dims.expand(k.shape[0], -1, -1)).float()
    labels = (labels - label_mean) / label_scale
    if dtype == torch.float8_e4m3fn:
        labels = labels.clamp(-FP8_MAX, FP8_MAX)
    return labels.to(dtype)


def combine_group(scores: torch.Tensor, combine: str) -> torch.Tensor:
    """Make one score per KV head out of the scores of its query heads.

    Args:
        scores: ``[..., G, L]``, float32, scaled like attention logits; ``-inf`` where no token is,
            after all tokens.
        combine: ``nrm`` sums exp(score - that head's anchor), ``mean`` averages. The anchor is the
            head's largest score among the first ``FIRST_ANCHORS`` and the latest of
            ``NUM_ANCHORS`` tokens: nearly its maximum, without a pass over all tokens.

    Returns:
        ``[..., L]``, float32, ``-inf`` where no token is.

    Raises:
        ValueError: Another ``combine``.

    Source: ``nrm`` is LOCKS' peak-normalised mass; ``mean`` is one dot product with the mean query.
    """
    if combine == "mean":
        return scores.mean(dim=-2)
    if combine != "nrm":
        raise ValueError(f"combine must be one of {', '.join(COMBINE_RULES)}, got {combine!r}")
    nothing = scores == -torch.inf
    count = (~nothing).sum(dim=-1, keepdim=True)
    places = torch.arange(NUM_ANCHORS, device=scores.device).expand(*scores.shape[:-1], -1)
    places = torch.where(places < FIRST_ANCHORS, places, count - NUM_ANCHORS + places)
    places = places.clamp(min=0).minimum((count - 1).clamp(min=0))
    anchor = scores.gather(-1, places).amax(dim=-1, keepdim=True)
    mass = (scores - anchor).clamp(max=MOST_ABOVE_ANCHORS).exp().sum(dim=-2)
    return mass.masked_fill(nothing[..., 0, :], -torch.inf)


def token_importance(
    q: torch.Tensor,
    label_cache: torch.Tensor,
    dominant_dims: torch.Tensor,
    label_scale: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
    combine: str,
) -> torch.Tensor:
    """Score every cached token with the dominant frequency chunks only: FASA's TIP.

    Args:
        q: Decode queries after RoPE, ``[B, HQ, D]``.
        label_cache: One row of ``pack_labels`` per slot, ``[num_slots, HKV, F]``.
        dominant_dims: Head dims the labels hold, ``[HKV, F]``, int64.
        label_scale: As given to ``pack_labels``, ``[HKV, F]``, float32.
        slots: Position to slot, ``[B, L]``, int; entries from ``seq_lens`` on are ignored.
        seq_lens: Tokens of each request, ``[B]``, int.
        sm_scale: Multiplies ``q @ k``; matters to ``combine="nrm"``.
        combine: See ``combine_group``.

    Returns:
        ``[B, HKV, L]``, float32, ``-inf`` from ``seq_lens - 1`` on: the last token is the current
        one, which has no label yet and is always selected.

    Source: FASA, https://arxiv.org/abs/2602.03152, token importance prediction; one set of
    chunks and one ranking per KV head is ours.
    """
    num_kv_heads = dominant_dims.shape[0]
    q = _group_heads(q, num_kv_heads)
    q = q.gather(-1, dominant_dims[None, :, None, :].expand(*q.shape[:3], -1))
    labels = _rows(label_cache, _inside(slots, seq_lens)).float() * label_scale
    scores = torch.einsum("bhgf,blhf->bhgl", q, labels) * sm_scale
    return combine_group(_mask_past_end(scores, seq_lens - 1), combine)


def oracle_importance(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
) -> torch.Tensor:
    """The exact answer: each token's softmax weight, summed over the group's heads.

    Arguments and result as in ``token_importance``, with ``k_cache`` ``[num_slots, HKV, D]``.
    """
    scores = _full_scores(q, k_cache, slots, seq_lens, sm_scale)
    past_end = scores[:, :, 0] == -torch.inf
    return scores.softmax(dim=-1).sum(dim=2).masked_fill(past_end, -torch.inf)


def quest_importance(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
    combine: str,
) -> torch.Tensor:
    """Quest's upper bound of ``q @ k`` over pages of 16 tokens; a page's tokens share its score.

    Arguments and result as in ``oracle_importance``. Ties keep their order in
    ``select_tokens``, so whole pages are taken, except the last one the budget cuts.

    Source: Quest, https://arxiv.org/abs/2406.10774, here with one page set per KV head.
    """
    q = _group_heads(q, k_cache.shape[1])
    longest = slots.shape[1]
    # Past its end a request repeats its last key, which changes no bound of a page before that.
    places = torch.arange(longest + -longest % QUEST_PAGE_SIZE, device=slots.device)
    places = torch.minimum(places, seq_lens[:, None] - 1)
    pages = k_cache[slots.long().gather(1, places)].unflatten(1, (-1, QUEST_PAGE_SIZE))
    # The larger of q * low and q * high, dim by dim: the sign of q decides.
    above = torch.einsum("bhgd,bphd->bhgp", q.clamp(min=0), pages.amax(dim=2).float())
    below = torch.einsum("bhgd,bphd->bhgp", q.clamp(max=0), pages.amin(dim=2).float())
    bounds = (above + below) * sm_scale
    scores = bounds.repeat_interleave(QUEST_PAGE_SIZE, dim=-1)[..., :longest]
    return combine_group(_mask_past_end(scores, seq_lens), combine)


def per_head_importance(
    q: torch.Tensor,
    head_dims: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
    combine: str,
) -> torch.Tensor:
    """FASA's scores with dominant chunks of every query head's own, straight from the keys.

    Arguments and result as in ``oracle_importance``, and ``head_dims``, 1 at the head dims that a
    query head reads and 0 elsewhere, ``[HQ, D]``, float32.

    Source: FASA, https://arxiv.org/abs/2602.03152, whose chunks are those of query heads.
    """
    scores = _full_scores(q * head_dims, k_cache, slots, seq_lens, sm_scale)
    return combine_group(scores, combine)


def page_importance(scores: torch.Tensor) -> torch.Tensor:
    """Give every token the best score of its page, as page-granular selection would.

    Args:
        scores: ``[B, HKV, L]``, float32, ``-inf`` past the end.

    Returns:
        Likewise; ``-inf`` where it was.
    """
    longest = scores.shape[-1]
    filled = torch.nn.functional.pad(scores, (0, -longest % QUEST_PAGE_SIZE), value=-torch.inf)
    best = filled.unflatten(-1, (-1, QUEST_PAGE_SIZE)).amax(dim=-1)
    spread = best.repeat_interleave(QUEST_PAGE_SIZE, dim=-1)[..., :longest]
    return spread.masked_fill(scores == -torch.inf, -torch.inf)


def streaming_importance(seq_lens: torch.Tensor, num_kv_heads: int, longest: int) -> torch.Tensor:
    """Newer is better: with a sink this is StreamingLLM. ``[B, HKV, L]`` as ``token_importance``.

    Source: StreamingLLM, https://arxiv.org/abs/2309.17453.
    """
    newer = torch.arange(longest, dtype=torch.float32, device=seq_lens.device)
    return _mask_past_end(newer.expand(len(seq_lens), num_kv_heads, -1), seq_lens)


def random_importance(
    seq_lens: torch.Tensor, num_kv_heads: int, longest: int, *, seeds: list[int]
) -> torch.Tensor:
    """Chance, the null baseline. ``[B, HKV, L]`` as ``token_importance``.

    A request's scores depend on its seed alone, not on the device or on what is served beside it.
    """
    device = seq_lens.device
    rows = _scramble(torch.tensor([seed % 2**32 for seed in seeds], device=device))
    rows = _scramble(rows[:, None] + torch.arange(num_kv_heads, device=device))
    scores = _scramble(rows[..., None] + torch.arange(longest, device=device))
    return _mask_past_end(scores.float(), seq_lens)


def _scramble(x: torch.Tensor) -> torch.Tensor:
    """A random-looking number below 2 ** 32 for each, int64. Source: Wellons' ``lowbias32``."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def select_tokens(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    budget: int,
    sink: int,
    recent: int,
    full_prefix_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the best tokens of every row, and the sink and recent tokens whatever they score.

    Args:
        scores: ``[B, HKV, L]``, float32, ``-inf`` past the end. Among equals the earlier wins.
        seq_lens: Tokens of each request, ``[B]``, int.
        budget: Tokens to keep, ``sink`` and ``recent`` among them; all if the request is shorter.
        sink: First tokens that are always kept.
        recent: Last tokens that are always kept; the current one is even if this is 0.
        full_prefix_lens: First tokens of each request that are kept on top of the budget,
            ``[B]``, int; the sink is then among them. Default: none.

    Returns:
        Positions in rising order, ``[B, HKV, N]``, int64, padded with -1; and how many of each
        row are valid, ``[B, HKV]``, int64.

    Source: FASA's top-k, https://arxiv.org/abs/2602.03152; sink and recent are ours.
    """
    batch_size, num_kv_heads, _ = scores.shape
    rows = []
    for b in range(batch_size):
        seq_len = int(seq_lens[b])
        prefix_len = 0 if full_prefix_lens is None else int(full_prefix_lens[b])
        ranked = scores[b, :, :seq_len].clone()
        ranked[:, : max(sink, prefix_len)] = torch.inf
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
) -> torch.Tensor:
    """Attend to the selected tokens only: FASA's focused attention computation (FAC).

    Args:
        q: Decode queries after RoPE, ``[B, HQ, D]``.
        k_cache: Keys after RoPE, one row per slot, ``[num_slots, HKV, D]``.
        v_cache: Values, ``[num_slots, HKV, D]``.
        slots: Position to slot, ``[B, L]``, int.
        positions: Tokens to attend to, ``[B, HKV, N]``, int64, -1 for none.
        sm_scale: Multiplies ``q @ k``; usually ``D ** -0.5``.

    Returns:
        ``[B, HQ, D]``, float32. A row with no selected token is zero.

    Source: FASA, https://arxiv.org/abs/2602.03152, focused attention computation.
    """
    num_kv_heads = k_cache.shape[1]
    q = _group_heads(q, num_kv_heads)
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(num_kv_heads):
            chosen = slots[b, positions[b, h][positions[b, h] >= 0]].long()
            if len(chosen):
                logits = q[b, h] @ k_cache[chosen, h].float().T * sm_scale
                out[b, h] = logits.softmax(dim=-1) @ v_cache[chosen, h].float()
    return out.flatten(1, 2)


def fasa_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    label_cache: torch.Tensor,
    dominant_dims: torch.Tensor,
    label_scale: torch.Tensor,
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
    scores = token_importance(
        q,
        label_cache,
        dominant_dims,
        label_scale,
        slots,
        seq_lens,
        sm_scale=sm_scale,
        combine=combine,
    )
    positions, _ = select_tokens(
        scores,
        seq_lens,
        budget=budget,
        sink=sink,
        recent=recent,
        full_prefix_lens=full_prefix_lens,
    )
    return focused_attention(q, k_cache, v_cache, slots, positions, sm_scale=sm_scale)


def _group_heads(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[B, HQ, D]`` to ``[B, HKV, G, D]``, float32."""
    return q.float().unflatten(1, (num_kv_heads, -1))


def _full_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """Attention logits of the whole head, ``[B, HKV, G, L]``, float32, ``-inf`` past the end."""
    keys = k_cache[_inside(slots, seq_lens)].float()
    scores = torch.einsum("bhgd,blhd->bhgl", _group_heads(q, k_cache.shape[1]), keys) * sm_scale
    return _mask_past_end(scores, seq_lens)


def _inside(slots: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Slots with slot 0 wherever a request has no token, so that any padding can be gathered."""
    return slots.long().masked_fill(_past_end(slots.shape[1], seq_lens), 0)


def _rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]``; PyTorch has no indexing of float8 on the CPU."""
    if table.dtype == torch.float8_e4m3fn:
        return table.view(torch.uint8)[index].view(table.dtype)
    return table[index]


def _past_end(longest: int, seq_lens: torch.Tensor) -> torch.Tensor:
    return torch.arange(longest, device=seq_lens.device) >= seq_lens[:, None]


def _mask_past_end(scores: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Write ``-inf`` from ``seq_lens`` on; ``scores`` is ``[B, ..., L]``."""
    past_end = _past_end(scores.shape[-1], seq_lens)
    middle = (1,) * (scores.dim() - 2)
    return scores.masked_fill(past_end.view(len(seq_lens), *middle, -1), -torch.inf)
