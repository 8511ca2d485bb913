"""Exact top-k per (request, KV head) on the GPU, written as the indices that attention reads.

Three kernels: ``threshold_guess`` guesses a row's threshold from a sample of its scores,
``candidates`` collects all tokens that reach the guess, somewhat more than the budget, in one pass
over the row, and the kernel below chooses the exact set among them, one thread block per row.
Blocks share long rows, which FlashInfer's top-k gives to one block each, and every row may have
its own budget. Where the guess was too high, or far too low, the last kernel ranks the whole row.
Reference: ``ops.reference.select_tokens``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fasa_sglang.ops.candidates import CAPACITY, collect_candidates
from fasa_sglang.ops.threshold_guess import guess_thresholds
from fasa_sglang.ops.token_importance import ScoreBuffers

# Candidates that the last kernel holds in registers; more are read from memory in every step of
# its search.
REGISTER_CANDIDATES = 4096
# Steps of the search that interpolate between the counts at both ends before bisection takes over.
INTERPOLATION_STEPS = 8
# Multiprocessors of an H100, and the blocks of one warp that each runs at once.
NUM_PROCESSORS, BLOCKS_PER_PROCESSOR = 132, 32
# Below and above every order key.
MIN_KEY, MAX_KEY = -(2**16), 2**16


@triton.jit
def _order_key(b_x):
    """Map float16 to int32 in the same order."""
    b_key = b_x.to(tl.int16, bitcast=True).to(tl.int32)
    return b_key ^ ((b_key >> 15) & 0x7FFF)


@triton.jit
def _bisect(lower, upper, middle, num_reaching, quota):
    """Narrow the search; an exact fit ends it, because there is no tie to break then."""
    below = tl.where(
        num_reaching > quota, upper, tl.where(num_reaching == quota, middle, middle - 1)
    )
    return tl.where(num_reaching >= quota, middle, lower), below


@triton.jit
def _load_candidates(p_row, p_position, o_c, num_above, num, CAPACITY: tl.constexpr):
    """Validity, positions and order keys of some candidates, those above the guess first."""
    m_c = o_c < num
    o_p = tl.where(o_c < num_above, o_c, 2 * CAPACITY - 1 + num_above - o_c)
    b_pos = tl.load(p_position + o_p, mask=m_c, other=0)
    return m_c, b_pos, _order_key(tl.load(p_row + b_pos, mask=m_c, other=0.0))


@triton.jit
def _load_ranked(p_row, p_position, o_c, num_above, num, first, whole_row, CAPACITY: tl.constexpr):
    """The same; or, if ``whole_row``, of all tokens from position ``first`` on."""
    if whole_row:
        m_c, b_pos = o_c < num, first + o_c
        b_key = _order_key(tl.load(p_row + b_pos, mask=m_c, other=0.0))
    else:
        m_c, b_pos, b_key = _load_candidates(p_row, p_position, o_c, num_above, num, CAPACITY)
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
    selection_counts_ptr,
    counted_ptr,
    scores_stride,
    indices_stride,
    H: tl.constexpr,
    NC: tl.constexpr,
    NF: tl.constexpr,
    MIN_KEY: tl.constexpr,
    MAX_KEY: tl.constexpr,
    INTERPOLATIONS: tl.constexpr,
    CAPACITY: tl.constexpr,
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
    p_position = positions_ptr + i_r.to(tl.int64) * (2 * CAPACITY)
    # Tokens to choose by score, and indices written so far.
    quota, num_written = budget - sink - recent, sink + recent
    # Fill the quota with tokens at the guess; which ones does not matter, as all of them tie.
    num_filling = tl.minimum(tl.maximum(quota - num_above, 0), num_at)
    num_candidates = num_above + num_filling
    o_c = tl.arange(0, NC)
    m_c, b_pos, b_key = _load_candidates(
        p_row, p_position, o_c, num_above, tl.minimum(num_candidates, NC), CAPACITY
    )
    b_key = tl.where(m_c, b_key, MIN_KEY)
    # Tokens that need no ranking: sink and recent ones, or all of a row within its budget.
    fits = seq_len <= budget
    num_forced = tl.where(fits, seq_len, sink + recent)
    for i_f in range(0, tl.cdiv(num_forced, NF)):
        o_f = i_f * NF + tl.arange(0, NF)
        b_forced = tl.where(fits | (o_f < sink), o_f, seq_len - recent + o_f - sink)
        b_slot = tl.load(p_slot + b_forced, mask=o_f < num_forced, other=0)
        tl.store(p_index + o_f, b_slot * H + i_h, mask=o_f < num_forced)
        if COUNTS and counted:
            tl.atomic_add(selection_counts_ptr + b_slot, 1, mask=o_f < num_forced, sem="relaxed")
    # Whether the candidates include the exact set: the guess was not too high, and no list is full.
    complete = (num_candidates >= quota) & (num_above <= CAPACITY) & (num_filling <= CAPACITY)
    if (fits == 0) & complete & (num_candidates <= NC):
        # Look for the greatest key that at least `quota` candidates reach, first by interpolation
        # between the counts at both ends (the Illinois method), then by bisection.
        lower = tl.min(tl.where(m_c, b_key, MAX_KEY), axis=0)
        upper = tl.where(num_candidates == quota, lower, tl.max(b_key, axis=0))
        surplus, deficit = (num_candidates - quota).to(tl.float32), quota.to(tl.float32)
        side, step = 0, 0
        while lower < upper:
            advance = ((upper - lower + 1) * (surplus / (surplus + deficit))).to(tl.int32)
            advance = tl.minimum(tl.maximum(advance, 1), upper - lower)
            middle = lower + tl.where(step < INTERPOLATIONS, advance, (upper - lower + 1) // 2)
            num_reaching = tl.sum((b_key >= middle).to(tl.int32), axis=0)
            rises = num_reaching > quota
            # An end that stays for a second time counts half; otherwise it would stall the search.
            surplus = tl.where(side < 0, surplus / 2, surplus)
            deficit = tl.where(side > 0, deficit / 2, deficit)
            surplus = tl.where(rises, (num_reaching - quota).to(tl.float32), surplus)
            deficit = tl.where(rises, deficit, (quota - num_reaching).to(tl.float32))
            lower, upper = _bisect(lower, upper, middle, num_reaching, quota)
            side, step = tl.where(rises, 1, -1), step + 1
        # Ties are counted in the upper half of the word, so that one scan serves both.
        b_above, b_tie = b_key > lower, b_key == lower
        b_one = b_above.to(tl.int32) + (b_tie.to(tl.int32) << 16)
        b_scan = tl.cumsum(b_one, axis=0) - b_one
        num_above = tl.sum(b_above.to(tl.int32), axis=0)
        b_place = tl.where(b_above, b_scan & 0xFFFF, num_above + (b_scan >> 16))
        m_selected = b_above | (b_tie & (b_place < quota))
        b_slot = tl.load(p_slot + b_pos, mask=m_selected, other=0)
        tl.store(p_index + num_written + b_place, b_slot * H + i_h, mask=m_selected)
        if COUNTS and counted:
            tl.atomic_add(selection_counts_ptr + b_slot, 1, mask=m_selected, sem="relaxed")
    if (fits == 0) & ((complete == 0) | (num_candidates > NC)):
        whole_row = complete == 0
        num = tl.where(whole_row, seq_len - sink - recent, num_candidates)
        lower = tl.full([], MIN_KEY, tl.int32)
        upper = tl.full([], MAX_KEY, tl.int32)
        while lower < upper:
            middle = lower + (upper - lower + 1) // 2
            num_reaching = 0
            for i_t in range(0, tl.cdiv(num, NC)):
                m_t, b_pos_t, b_key_t = _load_ranked(
                    p_row, p_position, i_t * NC + o_c, num_above, num, sink, whole_row, CAPACITY
                )
                num_reaching += tl.sum((m_t & (b_key_t >= middle)).to(tl.int32), axis=0)
            lower, upper = _bisect(lower, upper, middle, num_reaching, quota)
        # Write all tokens above the key first, then ties until the budget is used up.
        for ties in range(2):
            for i_t in range(0, tl.cdiv(num, NC)):
                m_t, b_pos_t, b_key_t = _load_ranked(
                    p_row, p_position, i_t * NC + o_c, num_above, num, sink, whole_row, CAPACITY
                )
                b_one_t = (m_t & tl.where(ties == 1, b_key_t == lower, b_key_t > lower)).to(
                    tl.int32
                )
                b_place_t = num_written + tl.cumsum(b_one_t, axis=0) - b_one_t
                m_selected_t = (b_one_t == 1) & (b_place_t < budget)
                b_slot_t = tl.load(p_slot + b_pos_t, mask=m_selected_t, other=0)
                tl.store(p_index + b_place_t, b_slot_t * H + i_h, mask=m_selected_t)
                if COUNTS and counted:
                    tl.atomic_add(
                        selection_counts_ptr + b_slot_t, 1, mask=m_selected_t, sem="relaxed"
                    )
                num_written += tl.sum(b_one_t, axis=0)
    # The next layer's collecting pass expects zeros.
    tl.store(counts_ptr + 2 * i_r, 0)
    tl.store(counts_ptr + 2 * i_r + 1, 0)


class SelectionBuffers:
    """Scratch of the selection, for as many rows as ``scores`` has.

    Attributes:
        guesses: Guessed threshold of each row, ``[rows]``, float16.
        counts: Candidates above and at the guess, ``[rows, 2]``, int32; 0 between calls.
        positions: Candidates of each row, ``[rows, 2 * CAPACITY]``, int32.
    """

    def __init__(self, scores: ScoreBuffers) -> None:
        rows, device = scores.scores.shape[0], scores.scores.device
        self.guesses = torch.empty(rows, dtype=torch.float16, device=device)
        self.counts = torch.zeros(rows, 2, dtype=torch.int32, device=device)
        self.positions = torch.empty(rows, 2 * CAPACITY, dtype=torch.int32, device=device)

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
    selection_counts: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
) -> None:
    """Write the best tokens of every row as rows of the KV pool seen head by head.

    Nothing is allocated and nothing synchronises.

    Args:
        scores: Output of ``token_importance``.
        slots: Position to slot, request after request, ``[>= total tokens]``, int32.
        starts: Start of each request's slots, ``[>= B]``, int32.
        seq_lens: Tokens of each request, ``[B]``, int32.
        budgets: Tokens to select, sink and recent ones included, ``[B]``, int32; more than
            ``sinks + recents``, at most ``indices.shape[1]``.
        sinks: First tokens that are always selected, ``[B]``, int32.
        recents: Last tokens that are always selected, ``[B]``, int32.
        buffers: Scratch.
        indices: Receives ``slot * num_kv_heads + kv_head`` of the selected tokens, in no order,
            ``[B * HKV, K]``, int32. Entries from ``min(budget, seq_len)`` on are left unchanged.
        num_kv_heads: KV heads of this rank.
        selection_counts: Incremented for every selection of a slot, ``[num_slots]``, int32.
        counted: 1 for requests whose selections are counted, else 0, ``[B]``, int32; needed with
            ``selection_counts``.

    Reference: :func:`fasa_sglang.ops.reference.select_tokens`.
    """
    rows = len(seq_lens) * num_kv_heads
    lengths = (seq_lens, budgets, sinks, recents)
    # With at most one row per multiprocessor of an H100 many warps are fastest; more rows share it.
    num_warps = 8 if rows <= NUM_PROCESSORS else 4
    guess_thresholds(scores, *lengths, buffers.guesses, num_kv_heads, num_warps)
    collect_candidates(
        scores,
        *lengths,
        buffers.guesses,
        buffers.counts,
        buffers.positions,
        num_kv_heads,
        NUM_PROCESSORS * BLOCKS_PER_PROCESSOR,
    )
    _settle_kernel[(rows,)](
        scores.scores,
        slots,
        starts,
        *lengths,
        buffers.counts,
        buffers.positions,
        indices,
        selection_counts,
        counted,
        scores.scores.stride(0),
        indices.stride(0),
        H=num_kv_heads,
        NC=REGISTER_CANDIDATES,
        NF=64,
        MIN_KEY=MIN_KEY,
        MAX_KEY=MAX_KEY,
        INTERPOLATIONS=INTERPOLATION_STEPS,
        CAPACITY=CAPACITY,
        COUNTS=selection_counts is not None,
        num_warps=num_warps,
    )
