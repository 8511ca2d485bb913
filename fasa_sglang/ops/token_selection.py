"""Exact top-k per (request, KV head) on the GPU, written as the indices that attention reads.

A row's threshold is first guessed from a sample of its scores, on the low side. One pass over the
row then collects all that reach the guess, somewhat more than the budget, and one thread block per
row settles the exact set among them. Blocks share long rows, which FlashInfer's top-k gives to one
block each, and every row may have its own budget.

The guess is a score of the row, and tokens that equal it are collected apart from those above it,
so that a row of ties is as quick as any. The guess decides only how fast it goes. Where it was too
high (about once in a million rows), or far too low, the last step ranks the whole row.
Reference: ``ops.reference.select_tokens``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fasa_sglang.ops.token_importance import ScoreBuffers

NUM_BINS = 128
# The guess looks at one score in so many, in groups of 16 bytes; at no fewer, no more than so many.
SAMPLED = 16
SMALLEST_SAMPLE, LARGEST_SAMPLE = 2048, 8192
GROUP = 8
# Standard deviations by which the guess errs on the low side.
CAUTION = 5.0
# Candidates above and at the guess that a row has room for, and how many of both the last step
# holds in registers.
ROOM = 8192
IN_REGISTERS = 4096
# Steps that look for the threshold where the counts point to, before halving takes over.
POINTED_STEPS = 8
# A tile of one warp, whose scan needs no barrier.
BLOCK_TOKENS = 512
NUM_PROCESSORS = 132


@triton.jit
def _order_key(b_x):
    """Map float16 to int32 in the same order."""
    b_key = b_x.to(tl.int16, bitcast=True).to(tl.int32)
    return b_key ^ ((b_key >> 15) & 0x7FFF)


@triton.jit
def _guess(
    p_row,
    seq_len,
    budget,
    sink,
    recent,
    NB: tl.constexpr,
    SAMPLED: tl.constexpr,
    SMALLEST: tl.constexpr,
    SAMPLE: tl.constexpr,
    GROUP: tl.constexpr,
    CAUTION: tl.constexpr,
):
    """A score of a row that surely enough of its tokens reach, and few more."""
    sample = tl.minimum(tl.maximum(seq_len // SAMPLED, SMALLEST), SAMPLE)
    stride = tl.cdiv(seq_len, sample)
    o_i = tl.arange(0, SAMPLE)
    o_t = (o_i // GROUP) * (GROUP * stride) + o_i % GROUP
    m_free = (o_t >= sink) & (o_t < seq_len - recent)
    b_score = tl.load(p_row + o_t, mask=m_free, other=0.0).to(tl.float32)
    high = tl.max(tl.where(m_free, b_score, float("-inf")), axis=0)
    low = tl.min(tl.where(m_free, b_score, float("inf")), axis=0)
    width = tl.maximum((high - low) / NB, 1e-30)
    b_bin = tl.minimum(((tl.where(m_free, b_score, low) - low) / width).to(tl.int32), NB - 1)
    b_count = tl.histogram(b_bin, NB, mask=m_free)
    num = tl.sum(b_count, axis=0)
    b_reach = num - tl.cumsum(b_count, axis=0) + b_count
    # So many of the sample are expected among the best; their number varies like a Poisson's.
    share = (budget - sink - recent) * num.to(tl.float32)
    share = share / tl.maximum(seq_len - sink - recent, 1)
    enough = share + CAUTION * tl.sqrt(share)
    bin = tl.maximum(tl.sum((b_reach >= enough).to(tl.int32), axis=0) - 1, 0)
    # The least score of that bin and the ones above: nothing lies between it and the bin's edge.
    guess = tl.min(tl.where(m_free & (b_bin >= bin), b_score, float("inf")), axis=0)
    # A sample that holds too few asks for the whole row.
    return tl.where(num >= enough, guess, float("-inf"))


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
    SAMPLED: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    CAUTION: tl.constexpr,
):
    i_r = tl.program_id(0)
    i_b = i_r // H
    # All before the branch, so that they wait together.
    seq_len, budget = tl.load(seq_lens_ptr + i_b), tl.load(budgets_ptr + i_b)
    sink, recent = tl.load(sinks_ptr + i_b), tl.load(recents_ptr + i_b)
    if seq_len <= budget:
        return
    p_row = scores_ptr + i_r.to(tl.int64) * scores_stride
    # A short row in a server of long contexts is not to pay for their sample.
    if seq_len <= SMALLEST * SAMPLED:
        guess = _guess(
            p_row, seq_len, budget, sink, recent, NB, SAMPLED, SMALLEST, SMALLEST, GROUP, CAUTION
        )
    else:
        guess = _guess(
            p_row, seq_len, budget, sink, recent, NB, SAMPLED, SMALLEST, LARGEST, GROUP, CAUTION
        )
    tl.store(guesses_ptr + i_r, guess)


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
    ROOM: tl.constexpr,
):
    """Positions above the guess from a row's front on, positions at the guess from its back."""
    i_s, i_r = tl.program_id(0), tl.program_id(1)
    i_b = i_r // H
    p_row = scores_ptr + i_r.to(tl.int64) * scores_stride
    p_position = positions_ptr + i_r.to(tl.int64) * (2 * ROOM)
    seq_len, budget = tl.load(seq_lens_ptr + i_b), tl.load(budgets_ptr + i_b)
    sink, recent = tl.load(sinks_ptr + i_b), tl.load(recents_ptr + i_b)
    guess = tl.load(guesses_ptr + i_r)
    if (seq_len <= budget) | (i_s * BT >= seq_len):
        return
    for i_t in range(i_s, tl.cdiv(seq_len, BT), tl.num_programs(0)):
        # Two scores a word, words spread over the lanes as the stores want them.
        o_w = tl.max_contiguous(i_t * (BT // 2) + tl.arange(0, BT // 2), 1)
        o_t = 2 * o_w
        b_word = tl.load(p_row.to(tl.pointer_type(tl.int32)) + o_w, mask=o_t < seq_len, other=0)
        b_low = (b_word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        b_high = (b_word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        m_low = (o_t >= sink) & (o_t < seq_len - recent)
        m_high = (o_t + 1 >= sink) & (o_t + 1 < seq_len - recent)
        m_low_above, m_high_above = m_low & (b_low > guess), m_high & (b_high > guess)
        m_low_at, m_high_at = m_low & (b_low == guess), m_high & (b_high == guess)
        # Both are counted in one word, so that one scan serves both.
        b_one = m_low_above.to(tl.int32) + (m_low_at.to(tl.int32) << 16)
        b_in = b_one + m_high_above.to(tl.int32) + (m_high_at.to(tl.int32) << 16)
        num_in = tl.sum(b_in, axis=0)
        if num_in > 0:
            b_scan = tl.cumsum(b_in, axis=0) - b_in
            start = tl.atomic_add(counts_ptr + 2 * i_r, num_in & 0xFFFF, sem="relaxed")
            if start + (num_in & 0xFFFF) <= ROOM:
                p_front = p_position + start
                tl.store(p_front + (b_scan & 0xFFFF), o_t, mask=m_low_above)
                tl.store(p_front + ((b_scan + b_one) & 0xFFFF), o_t + 1, mask=m_high_above)
            if num_in >= 0x10000:
                start = tl.atomic_add(counts_ptr + 2 * i_r + 1, num_in >> 16, sem="relaxed")
                b_place = start + (b_scan >> 16)
                p_back = p_position + 2 * ROOM - 1
                tl.store(p_back - b_place, o_t, mask=m_low_at & (b_place < ROOM))
                b_place = start + ((b_scan + b_one) >> 16)
                tl.store(p_back - b_place, o_t + 1, mask=m_high_at & (b_place < ROOM))


@triton.jit
def _bisect(lower, upper, middle, reach, wanted):
    """Narrow the search; an exact fit ends it, for then there is no tie to break."""
    below = tl.where(reach > wanted, upper, tl.where(reach == wanted, middle, middle - 1))
    return tl.where(reach >= wanted, middle, lower), below


@triton.jit
def _candidates(p_row, p_position, o_c, num_above, num, ROOM: tl.constexpr):
    """Positions and order keys of some candidates, those above the guess first."""
    m_c = o_c < num
    o_p = tl.where(o_c < num_above, o_c, 2 * ROOM - 1 + num_above - o_c)
    b_pos = tl.load(p_position + o_p, mask=m_c, other=0)
    return m_c, b_pos, _order_key(tl.load(p_row + b_pos, mask=m_c, other=0.0))


@triton.jit
def _ranked(p_row, p_position, o_c, num_above, num, first, whole, ROOM: tl.constexpr):
    """The same; or, if ``whole``, of all tokens from ``first`` on."""
    if whole:
        m_c, b_pos = o_c < num, first + o_c
        b_key = _order_key(tl.load(p_row + b_pos, mask=m_c, other=0.0))
    else:
        m_c, b_pos, b_key = _candidates(p_row, p_position, o_c, num_above, num, ROOM)
    return m_c, b_pos, b_key


@triton.jit
def _settle_kernel(
    scores_ptr,
    slots_ptr,
    starts_ptr,
    seq_lens_ptr,
    budgets_ptr,
    sinks_ptr,
    recents_ptr,
    counts_ptr,
    positions_ptr,
    indices_ptr,
    wanted_ptr,
    counted_ptr,
    scores_stride,
    indices_stride,
    H: tl.constexpr,
    NC: tl.constexpr,
    NK: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    POINTED: tl.constexpr,
    ROOM: tl.constexpr,
    COUNTS: tl.constexpr,
):
    i_r = tl.program_id(0)
    i_b, i_h = i_r // H, i_r % H
    seq_len, budget = tl.load(seq_lens_ptr + i_b), tl.load(budgets_ptr + i_b)
    sink, recent = tl.load(sinks_ptr + i_b), tl.load(recents_ptr + i_b)
    counted = 0
    if COUNTS:
        counted = tl.load(counted_ptr + i_b)
    num_above, num_at = tl.load(counts_ptr + 2 * i_r), tl.load(counts_ptr + 2 * i_r + 1)
    p_row = scores_ptr + i_r.to(tl.int64) * scores_stride
    p_slot = slots_ptr + tl.load(starts_ptr + i_b)
    p_index = indices_ptr + i_r.to(tl.int64) * indices_stride
    p_position = positions_ptr + i_r.to(tl.int64) * (2 * ROOM)
    wanted, written = budget - sink - recent, sink + recent
    # As many of those at the guess as are missing; one is as good as another.
    num_filling = tl.minimum(tl.maximum(wanted - num_above, 0), num_at)
    count = num_above + num_filling
    o_c = tl.arange(0, NC)
    m_c, b_pos, b_key = _candidates(p_row, p_position, o_c, num_above, tl.minimum(count, NC), ROOM)
    b_key = tl.where(m_c, b_key, LEAST)
    # The tokens that need no ranking: sink and recent, or all of a short row.
    short = seq_len <= budget
    num_kept = tl.where(short, seq_len, sink + recent)
    for i_k in range(0, tl.cdiv(num_kept, NK)):
        o_k = i_k * NK + tl.arange(0, NK)
        b_kept = tl.where(short | (o_k < sink), o_k, seq_len - recent + o_k - sink)
        b_slot = tl.load(p_slot + b_kept, mask=o_k < num_kept, other=0)
        tl.store(p_index + o_k, b_slot * H + i_h, mask=o_k < num_kept)
        if COUNTS and counted:
            tl.atomic_add(wanted_ptr + b_slot, 1, mask=o_k < num_kept, sem="relaxed")
    enough = (count >= wanted) & (num_above <= ROOM) & (num_filling <= ROOM)
    if (short == 0) & enough & (count <= NC):
        # Look for the greatest key that at least `wanted` candidates reach: first where the counts
        # at both ends point to, as the Illinois method does, then by halves.
        lower = tl.min(tl.where(m_c, b_key, MOST), axis=0)
        upper = tl.where(count == wanted, lower, tl.max(b_key, axis=0))
        over, under = (count - wanted).to(tl.float32), wanted.to(tl.float32)
        side, step = 0, 0
        while lower < upper:
            pointed = ((upper - lower + 1) * (over / (over + under))).to(tl.int32)
            pointed = tl.minimum(tl.maximum(pointed, 1), upper - lower)
            middle = lower + tl.where(step < POINTED, pointed, (upper - lower + 1) // 2)
            reach = tl.sum((b_key >= middle).to(tl.int32), axis=0)
            rise = reach > wanted
            # An end that stays for a second time counts half, or it would hold the search up.
            over = tl.where(side < 0, over / 2, over)
            under = tl.where(side > 0, under / 2, under)
            over = tl.where(rise, (reach - wanted).to(tl.float32), over)
            under = tl.where(rise, under, (wanted - reach).to(tl.float32))
            lower, upper = _bisect(lower, upper, middle, reach, wanted)
            side, step = tl.where(rise, 1, -1), step + 1
        # Ties are counted in the upper half of the word, so that one scan serves both.
        b_above, b_tie = b_key > lower, b_key == lower
        b_one = b_above.to(tl.int32) + (b_tie.to(tl.int32) << 16)
        b_scan = tl.cumsum(b_one, axis=0) - b_one
        num_above = tl.sum(b_above.to(tl.int32), axis=0)
        b_place = tl.where(b_above, b_scan & 0xFFFF, num_above + (b_scan >> 16))
        m_won = b_above | (b_tie & (b_place < wanted))
        b_slot = tl.load(p_slot + b_pos, mask=m_won, other=0)
        tl.store(p_index + written + b_place, b_slot * H + i_h, mask=m_won)
        if COUNTS and counted:
            tl.atomic_add(wanted_ptr + b_slot, 1, mask=m_won, sem="relaxed")
    if (short == 0) & ((enough == 0) | (count > NC)):
        whole = enough == 0
        num = tl.where(whole, seq_len - sink - recent, count)
        lower = tl.full([], LEAST, tl.int32)
        upper = tl.full([], MOST, tl.int32)
        while lower < upper:
            middle = lower + (upper - lower + 1) // 2
            reach = 0
            for i_t in range(0, tl.cdiv(num, NC)):
                m_t, b_pos_t, b_key_t = _ranked(
                    p_row, p_position, i_t * NC + o_c, num_above, num, sink, whole, ROOM
                )
                reach += tl.sum((m_t & (b_key_t >= middle)).to(tl.int32), axis=0)
            lower, upper = _bisect(lower, upper, middle, reach, wanted)
        # All above the key first, then as many ties as still fit.
        for ties in range(2):
            for i_t in range(0, tl.cdiv(num, NC)):
                m_t, b_pos_t, b_key_t = _ranked(
                    p_row, p_position, i_t * NC + o_c, num_above, num, sink, whole, ROOM
                )
                b_won = (m_t & tl.where(ties == 1, b_key_t == lower, b_key_t > lower)).to(tl.int32)
                b_place_t = written + tl.cumsum(b_won, axis=0) - b_won
                m_won_t = (b_won == 1) & (b_place_t < budget)
                b_slot_t = tl.load(p_slot + b_pos_t, mask=m_won_t, other=0)
                tl.store(p_index + b_place_t, b_slot_t * H + i_h, mask=m_won_t)
                if COUNTS and counted:
                    tl.atomic_add(wanted_ptr + b_slot_t, 1, mask=m_won_t, sem="relaxed")
                written += tl.sum(b_won, axis=0)
    # As the next layer's collecting expects it.
    tl.store(counts_ptr + 2 * i_r, 0)
    tl.store(counts_ptr + 2 * i_r + 1, 0)


class SelectionBuffers:
    """Scratch of the selection, for as many rows as ``scores`` has."""

    def __init__(self, scores: ScoreBuffers) -> None:
        rows, device = scores.scores.shape[0], scores.scores.device
        self.guesses = torch.empty(rows, dtype=torch.float16, device=device)
        self.counts = torch.zeros(rows, 2, dtype=torch.int32, device=device)
        self.positions = torch.empty(rows, 2 * ROOM, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in vars(self).values())


def select_tokens(
    scores: ScoreBuffers,
    slots: torch.Tensor,
    starts: torch.Tensor,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    sinks: torch.Tensor,
    recents: torch.Tensor,
    buffers: SelectionBuffers,
    indices: torch.Tensor,
    num_kv_heads: int,
    wanted: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
) -> None:
    """Write the best tokens of every row as rows of the KV pool seen head by head.

    Nothing is allocated and nothing synchronises.

    Args:
        scores: What ``token_importance`` left.
        slots: Position to slot, request after request, ``[>= all tokens]``, int32.
        starts: Where each request's slots begin, ``[>= B]``, int32.
        seq_lens: Tokens of each request, ``[B]``, int32.
        budgets: Tokens to keep, sink and recent among them, ``[B]``, int32; more than
            ``sinks + recents``, at most ``indices.shape[1]``.
        sinks: First tokens that are always kept, ``[B]``, int32.
        recents: Last tokens that are always kept, ``[B]``, int32.
        buffers: Scratch.
        indices: Receives ``slot * num_kv_heads + kv_head`` of the kept tokens, in no order,
            ``[B * HKV, K]``, int32. Entries from ``min(budget, seq_len)`` on keep what they held.
        num_kv_heads: KV heads of this rank.
        wanted: Receives one more for every time that a slot was kept, ``[num_slots]``, int32.
        counted: Of which requests, ``[B]``, int32, 0 or 1; needed with ``wanted``.

    Reference: :func:`fasa_sglang.ops.reference.select_tokens`.
    """
    rows = len(seq_lens) * num_kv_heads
    longest = scores.scores.shape[1]
    lengths = (seq_lens, budgets, sinks, recents)
    # A row for every processor of an H100 is quickest with many warps; more rows share them.
    num_warps = 8 if rows <= NUM_PROCESSORS else 4
    _guess_kernel[(rows,)](
        scores.scores,
        *lengths,
        buffers.guesses,
        scores.scores.stride(0),
        H=num_kv_heads,
        NB=NUM_BINS,
        SAMPLED=SAMPLED,
        SMALLEST=SMALLEST_SAMPLE,
        LARGEST=SMALLEST_SAMPLE if longest <= SMALLEST_SAMPLE * SAMPLED else LARGEST_SAMPLE,
        GROUP=GROUP,
        CAUTION=CAUTION,
        num_warps=num_warps,
    )
    # As many blocks as run at once, all told.
    splits = max(1, min(triton.cdiv(longest, BLOCK_TOKENS), NUM_PROCESSORS * 32 // rows))
    _collect_kernel[(splits, rows)](
        scores.scores,
        *lengths,
        buffers.guesses,
        buffers.counts,
        buffers.positions,
        scores.scores.stride(0),
        H=num_kv_heads,
        BT=BLOCK_TOKENS,
        ROOM=ROOM,
        num_warps=1,
    )
    _settle_kernel[(rows,)](
        scores.scores,
        slots,
        starts,
        *lengths,
        buffers.counts,
        buffers.positions,
        indices,
        wanted,
        counted,
        scores.scores.stride(0),
        indices.stride(0),
        H=num_kv_heads,
        NC=IN_REGISTERS,
        NK=64,
        # Past every order key.
        LEAST=-(2**16),
        MOST=2**16,
        POINTED=POINTED_STEPS,
        ROOM=ROOM,
        COUNTS=wanted is not None,
        num_warps=num_warps,
    )
