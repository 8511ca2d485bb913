"""Collect the tokens that reach a row's guessed threshold: the second step of the selection.

Several blocks share a row. Tokens above the guess and tokens that equal it are collected apart, so
that a row full of ties takes no longer than any other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fasa_sglang.ops.token_importance import ScoreBuffers

# Candidates above the guess, and as many at the guess, that fit into a row's list.
CAPACITY = 8192
# Tokens of a tile: small enough for one warp, whose scan needs no barrier.
BLOCK_TOKENS = 512


@triton.jit
def _collect_kernel(
    scores_ptr,
    seq_lens_ptr,
    budgets_ptr,
    sinks_ptr,
    recents_ptr,
    guesses_ptr,
    counts_ptr,
    positions_ptr,
    scores_stride,
    H: tl.constexpr,
    BT: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Store positions above the guess from the list's front on, those at it from its back."""
    i_s, i_r = tl.program_id(0), tl.program_id(1)
    i_b = i_r // H
    p_row = scores_ptr + i_r.to(tl.int64) * scores_stride
    p_position = positions_ptr + i_r.to(tl.int64) * (2 * CAPACITY)
    seq_len, budget = tl.load(seq_lens_ptr + i_b), tl.load(budgets_ptr + i_b)
    sink, recent = tl.load(sinks_ptr + i_b), tl.load(recents_ptr + i_b)
    guess = tl.load(guesses_ptr + i_r)
    if (seq_len <= budget) | (i_s * BT >= seq_len):
        return
    for i_t in range(i_s, tl.cdiv(seq_len, BT), tl.num_programs(0)):
        # Load two scores per 32-bit word, the words in the layout that the stores use.
        o_w = tl.max_contiguous(i_t * (BT // 2) + tl.arange(0, BT // 2), 1)
        o_t = 2 * o_w
        b_word = tl.load(p_row.to(tl.pointer_type(tl.int32)) + o_w, mask=o_t < seq_len, other=0)
        b_low = (b_word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        b_high = (b_word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        m_low = (o_t >= sink) & (o_t < seq_len - recent)
        m_high = (o_t + 1 >= sink) & (o_t + 1 < seq_len - recent)
        m_low_above, m_high_above = m_low & (b_low > guess), m_high & (b_high > guess)
        m_low_at, m_high_at = m_low & (b_low == guess), m_high & (b_high == guess)
        # Tokens above are counted in the lower half of a word, tokens at the guess in the upper
        # half, so that one scan serves both.
        b_one = m_low_above.to(tl.int32) + (m_low_at.to(tl.int32) << 16)
        b_count = b_one + m_high_above.to(tl.int32) + (m_high_at.to(tl.int32) << 16)
        count = tl.sum(b_count, axis=0)
        if count > 0:
            b_scan = tl.cumsum(b_count, axis=0) - b_count
            start = tl.atomic_add(counts_ptr + 2 * i_r, count & 0xFFFF, sem="relaxed")
            if start + (count & 0xFFFF) <= CAPACITY:
                p_front = p_position + start
                tl.store(p_front + (b_scan & 0xFFFF), o_t, mask=m_low_above)
                tl.store(p_front + ((b_scan + b_one) & 0xFFFF), o_t + 1, mask=m_high_above)
            if count >= 0x10000:
                start = tl.atomic_add(counts_ptr + 2 * i_r + 1, count >> 16, sem="relaxed")
                b_place = start + (b_scan >> 16)
                p_back = p_position + 2 * CAPACITY - 1
                tl.store(p_back - b_place, o_t, mask=m_low_at & (b_place < CAPACITY))
                b_place = start + ((b_scan + b_one) >> 16)
                tl.store(p_back - b_place, o_t + 1, mask=m_high_at & (b_place < CAPACITY))


def collect_candidates(
    scores: ScoreBuffers,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    sinks: torch.Tensor,
    recents: torch.Tensor,
    guesses: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    num_kv_heads: int,
    num_blocks: int,
) -> None:
    """Collect the candidates of every row that is longer than its budget.

    Args:
        scores: Output of ``token_importance``.
        seq_lens: Tokens of each request, ``[B]``, int32.
        budgets: Tokens to select, ``[B]``, int32.
        sinks: First tokens that are always selected, ``[B]``, int32; never candidates.
        recents: Last tokens that are always selected, ``[B]``, int32; never candidates.
        guesses: Output of ``guess_thresholds``, ``[>= B * HKV]``, float16.
        counts: Receives the number of tokens above and at the guess, ``[>= B * HKV, 2]``, int32;
            must be 0 before. Either may exceed ``CAPACITY``.
        positions: Receives the positions, ``[>= B * HKV, 2 * CAPACITY]``, int32: tokens above the
            guess from the front (undefined if they exceed ``CAPACITY``), the first ``CAPACITY``
            tokens at the guess from the back.
        num_kv_heads: KV heads of this rank.
        num_blocks: Thread blocks of all rows together.
    """
    rows, longest = len(seq_lens) * num_kv_heads, scores.scores.shape[1]
    splits = max(1, min(triton.cdiv(longest, BLOCK_TOKENS), num_blocks // rows))
    _collect_kernel[(splits, rows)](
        scores.scores,
        seq_lens,
        budgets,
        sinks,
        recents,
        guesses,
        counts,
        positions,
        scores.scores.stride(0),
        H=num_kv_heads,
        BT=BLOCK_TOKENS,
        CAPACITY=CAPACITY,
        num_warps=1,
    )
