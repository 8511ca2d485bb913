"""Check one layer's results against float32 before they are timed."""

from __future__ import annotations

import torch

from fasa_sglang.errors import FasaError
from fasa_sglang.ops import reference
from fasa_sglang.ops.layer_labels import LayerLabels

# Scores are float16 and in nats or bits; queries are rounded to float16 before the dot product.
SCORE_TOLERANCE = 4e-3
# Relative error of bfloat16 attention.
OUTPUT_TOLERANCE = 0.01


def expected_scores(
    q: torch.Tensor,
    labels: LayerLabels,
    slots: torch.Tensor,
    *,
    sm_scale: float,
    combine: str,
) -> torch.Tensor:
    """The scores of one request in float32, in the form that the kernel writes them.

    Args:
        q: Queries of one request, ``[HQ, D]``.
        labels: The layer's labels.
        slots: The request's slots, ``[L]``.
        sm_scale: Multiplies ``q @ k``.
        combine: See ``ops.reference.combine_group``.

    Returns:
        ``[HKV, L]``, float32. ``nrm`` scores become logarithms to base 2, linear between powers of
        two, as in ``ops.token_importance``.
    """
    seq_lens = torch.tensor([len(slots)], device=slots.device)
    [scores] = reference.token_importance(
        q[None], labels, slots[None], seq_lens, sm_scale=sm_scale, combine=combine
    )
    return scores.view(torch.int32) / 2**23 - 127 if combine == "nrm" else scores


def check_scores(
    scores: torch.Tensor, expected: torch.Tensor, *, sink: int, recent: int, forced: float
) -> None:
    """Check the scores of one request.

    Args:
        scores: The kernel's scores, ``[HKV, L]``.
        expected: Result of ``expected_scores``.
        sink: First tokens that are always selected.
        recent: Last tokens that are always selected, at least 1.
        forced: The kernel's score of tokens that are always selected.

    Raises:
        FasaError: A score is wrong.
    """
    end = scores.shape[-1] - recent
    free, target = scores[:, sink:end].float(), expected[:, sink:end]
    error = (free - target).abs()
    # Also true for NaN.
    wrong = ~(error <= SCORE_TOLERANCE * (1 + target.abs()))
    if wrong.any():
        head, token = (int(i) for i in wrong.nonzero()[0])
        raise FasaError(
            f"{int(wrong.sum())} of {wrong.numel()} scores differ from the float32 reference; KV "
            f"head {head} scored token {token + sink} {float(free[head, token]):.4f}, expected "
            f"{float(target[head, token]):.4f}"
        )
    if not ((scores[:, :sink] == forced).all() and (scores[:, end:] == forced).all()):
        raise FasaError("a sink or recent token does not have the score of a forced token")


def check_selection(
    indices: torch.Tensor, scores: torch.Tensor, slots: torch.Tensor, num_kv_heads: int
) -> None:
    """Check that one request's selection is the top-k of its scores.

    Args:
        indices: ``slot * num_kv_heads + kv_head`` of the selected tokens, ``[HKV, K]``.
        scores: The scores, ``[HKV, L]``.
        slots: The request's slots, ``[L]``.
        num_kv_heads: KV heads.

    Raises:
        FasaError: Names the KV head that selected other tokens.
    """
    count = indices.shape[1]
    positions = torch.full((int(slots.max()) + 1,), -1, dtype=torch.int64, device=slots.device)
    positions[slots.long()] = torch.arange(len(slots), device=slots.device)
    for head in range(num_kv_heads):
        selected = indices[head] // num_kv_heads
        in_range = (selected >= 0) & (selected < len(positions))
        own = (
            bool(in_range.all())
            and bool((indices[head] % num_kv_heads == head).all())
            and bool((positions[selected.long()] >= 0).all())
            and len(selected.unique()) == count
        )
        # Among equal scores any token may win, so compare scores instead of tokens.
        if own:
            values = scores[head, positions[selected.long()]].sort().values
            own = torch.equal(values, scores[head].topk(count).values.sort().values)
        if not own:
            raise FasaError(f"KV head {head} selected other tokens than torch.topk of its scores")


def output_error(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
) -> float:
    """Check one request's attention over its selected tokens.

    Args:
        out: The result, ``[HQ, D]``.
        q: The queries, ``[HQ, D]``.
        k_cache: Keys, ``[num_slots, HKV, D]``.
        v_cache: Values, like ``k_cache``.
        indices: As in ``check_selection``.
        sm_scale: Multiplies ``q @ k``.

    Returns:
        Relative error of the worst KV head.

    Raises:
        FasaError: It exceeds ``OUTPUT_TOLERANCE``.
    """
    num_kv_heads = k_cache.shape[1]
    worst = 0.0
    for head in range(num_kv_heads):
        selected = (indices[head] // num_kv_heads).long()
        group = slice(head * len(q) // num_kv_heads, (head + 1) * len(q) // num_kv_heads)
        logits = q[group].float() @ k_cache[selected, head].float().T * sm_scale
        expected = logits.softmax(dim=-1) @ v_cache[selected, head].float()
        error = float((out[group].float() - expected).norm() / expected.norm())
        # A comparison with NaN is false.
        if not error < OUTPUT_TOLERANCE:
            raise FasaError(
                f"attention of KV head {head} has a relative error of {error:.2e} to float32, "
                f"expected less than {OUTPUT_TOLERANCE}"
            )
        worst = max(worst, error)
    return worst
