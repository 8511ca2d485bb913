"""A threshold per row of scores, guessed from a sample: the first step of the selection.

The guess errs on the low side: at least as many tokens as needed almost certainly reach it, and
few more do. It is a score of the row, so that tokens that equal it can be told from those above.
It decides only how fast the selection is, never what it selects.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fasa_sglang.ops.token_importance import ScoreBuffers

NUM_BINS = 128
# Sample one score in 16, in runs of 16 bytes; at least 2,048 and at most 8,192 scores.
SAMPLE_EVERY = 16
MIN_SAMPLE, MAX_SAMPLE = 2048, 8192
RUN_LENGTH = 8
# Standard deviations by which the guess errs on the low side. With 5 it is too high about once in
# a million rows.
SAFETY_SIGMAS = 5.0


@triton.jit
def _sample_threshold(
    p_row,
    seq_len,
    budget,
    sink,
    recent,
    NB: tl.constexpr,
    EVERY: tl.constexpr,
    MIN_SAMPLE: tl.constexpr,
    SAMPLE: tl.constexpr,
    RUN: tl.constexpr,
    SIGMAS: tl.constexpr,
):
    """A score that at least ``budget`` tokens almost certainly reach, and few more do."""
    sample = tl.minimum(tl.maximum(seq_len // EVERY, MIN_SAMPLE), SAMPLE)
    stride = tl.cdiv(seq_len, sample)
    o_i = tl.arange(0, SAMPLE)
    o_t = (o_i // RUN) * (RUN * stride) + o_i % RUN
    m_free = (o_t >= sink) & (o_t < seq_len - recent)
    b_score = tl.load(p_row + o_t, mask=m_free, other=0.0).to(tl.float32)
    high = tl.max(tl.where(m_free, b_score, float("-inf")), axis=0)
    low = tl.min(tl.where(m_free, b_score, float("inf")), axis=0)
    width = tl.maximum((high - low) / NB, 1e-30)
    b_bin = tl.minimum(((tl.where(m_free, b_score, low) - low) / width).to(tl.int32), NB - 1)
    b_count = tl.histogram(b_bin, NB, mask=m_free)
    num_sampled = tl.sum(b_count, axis=0)
    # Sampled scores in each bin and the bins above it.
    b_reach = num_sampled - tl.cumsum(b_count, axis=0) + b_count
    # The best tokens of the row that the sample is expected to hold. Their number varies like a
    # Poisson variable, whose variance is its mean.
    expected = (budget - sink - recent) * num_sampled.to(tl.float32)
    expected = expected / tl.maximum(seq_len - sink - recent, 1)
    needed = expected + SIGMAS * tl.sqrt(expected)
    bin = tl.maximum(tl.sum((b_reach >= needed).to(tl.int32), axis=0) - 1, 0)
    # The lowest score in that bin or above: no sampled score lies between it and the bin's edge.
    guess = tl.min(tl.where(m_free & (b_bin >= bin), b_score, float("inf")), axis=0)
    # If the sample is too small, every token is a candidate.
    return tl.where(num_sampled >= needed, guess, float("-inf"))


@triton.jit
def _guess_kernel(
    scores_ptr,
    seq_lens_ptr,
    budgets_ptr,
    sinks_ptr,
    recents_ptr,
    guesses_ptr,
    scores_stride,
    H: tl.constexpr,
    NB: tl.constexpr,
    EVERY: tl.constexpr,
    MIN_SAMPLE: tl.constexpr,
    MAX_SAMPLE: tl.constexpr,
    RUN: tl.constexpr,
    SIGMAS: tl.constexpr,
):
    i_r = tl.program_id(0)
    i_b = i_r // H
    # All loads come before the branch, so that their latencies overlap.
    seq_len, budget = tl.load(seq_lens_ptr + i_b), tl.load(budgets_ptr + i_b)
    sink, recent = tl.load(sinks_ptr + i_b), tl.load(recents_ptr + i_b)
    if seq_len <= budget:
        return
    p_row = scores_ptr + i_r.to(tl.int64) * scores_stride
    # A short row takes a small sample even where the server allows long contexts.
    if seq_len <= MIN_SAMPLE * EVERY:
        guess = _sample_threshold(
            p_row, seq_len, budget, sink, recent, NB, EVERY, MIN_SAMPLE, MIN_SAMPLE, RUN, SIGMAS
        )
    else:
        guess = _sample_threshold(
            p_row, seq_len, budget, sink, recent, NB, EVERY, MIN_SAMPLE, MAX_SAMPLE, RUN, SIGMAS
        )
    tl.store(guesses_ptr + i_r, guess)


def guess_thresholds(
    scores: ScoreBuffers,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    sinks: torch.Tensor,
    recents: torch.Tensor,
    guesses: torch.Tensor,
    num_kv_heads: int,
    num_warps: int,
) -> None:
    """Guess the threshold of every row that is longer than its budget.

    Args:
        scores: Output of ``token_importance``.
        seq_lens: Tokens of each request, ``[B]``, int32.
        budgets: Tokens to select, ``[B]``, int32.
        sinks: First tokens that are always selected, ``[B]``, int32.
        recents: Last tokens that are always selected, ``[B]``, int32.
        guesses: Receives the thresholds, ``[>= B * HKV]``, float16; ``-inf`` where the sample is
            too small. Rows within their budget are not written.
        num_kv_heads: KV heads of this rank.
        num_warps: Warps per row.
    """
    longest = scores.scores.shape[1]
    _guess_kernel[(len(seq_lens) * num_kv_heads,)](
        scores.scores,
        seq_lens,
        budgets,
        sinks,
        recents,
        guesses,
        scores.scores.stride(0),
        H=num_kv_heads,
        NB=NUM_BINS,
        EVERY=SAMPLE_EVERY,
        MIN_SAMPLE=MIN_SAMPLE,
        MAX_SAMPLE=MIN_SAMPLE if longest <= MIN_SAMPLE * SAMPLE_EVERY else MAX_SAMPLE,
        RUN=RUN_LENGTH,
        SIGMAS=SAFETY_SIGMAS,
        num_warps=num_warps,
    )
