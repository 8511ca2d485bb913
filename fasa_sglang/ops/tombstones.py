"""Removes the tombstones of pruned tokens from the slots of a decode batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _close_gaps_kernel(slots_ptr, indptr_ptr, pruned_ptr, BT: tl.constexpr):
    i_b = tl.program_id(0)
    if tl.load(pruned_ptr + i_b) == 0:
        return
    begin = tl.load(indptr_ptr + i_b)
    seq_len = tl.load(indptr_ptr + i_b + 1) - begin
    p_slot = slots_ptr + begin
    written = 0
    # One thread block takes the tiles of a lane in order, so it writes only where it has read.
    for i_t in range(0, tl.cdiv(seq_len, BT)):
        o_t = i_t * BT + tl.arange(0, BT)
        b_slot = tl.load(p_slot + o_t, mask=o_t < seq_len, other=0)
        m_live = b_slot != 0
        b_live = m_live.to(tl.int32)
        b_place = written + tl.cumsum(b_live, axis=0) - b_live
        tl.debug_barrier()
        tl.store(p_slot + b_place, b_slot, mask=m_live)
        tl.debug_barrier()
        written += tl.sum(b_live, axis=0)


def close_gaps(slots: torch.Tensor, indptr: torch.Tensor, pruned: torch.Tensor) -> None:
    """Move the live slots of every lane to its front, in order and in place.

    Args:
        slots: Slots of all tokens, lane after lane, int32; 0 for pruned tokens. Entries behind a
            lane's live slots are undefined afterwards.
        indptr: Start of each lane in ``slots``, ``[B + 1]``, int32.
        pruned: Pruned tokens of each lane, ``[B]``, int32. Lanes without any are left as they are.

    Reference: ``slots[slots != 0]`` of every lane.
    """
    _close_gaps_kernel[(len(pruned),)](slots, indptr, pruned, BT=1024, num_warps=4)
