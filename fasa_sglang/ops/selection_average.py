"""Averages of how often each generated token was selected, updated by one kernel per step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Thread blocks that share the tokens of one lane.
SPLITS = 16


@triton.jit
def _average_kernel(
    slots_ptr,
    indptr_ptr,
    prompt_lens_ptr,
    live_lens_ptr,
    counted_ptr,
    counts_ptr,
    average_ptr,
    share,
    decay,
    BT: tl.constexpr,
):
    i_s, i_b = tl.program_id(0), tl.program_id(1)
    if tl.load(counted_ptr + i_b) == 0:
        return
    prompt_len, live_len = tl.load(prompt_lens_ptr + i_b), tl.load(live_lens_ptr + i_b)
    p_slot = slots_ptr + tl.load(indptr_ptr + i_b)
    for i_t in range(i_s, tl.cdiv(live_len - prompt_len, BT), tl.num_programs(0)):
        o_t = prompt_len + i_t * BT + tl.arange(0, BT)
        m_t = o_t < live_len
        b_slot = tl.load(p_slot + o_t, mask=m_t, other=0).to(tl.int64)
        b_count = tl.load(counts_ptr + b_slot, mask=m_t, other=0).to(tl.float32)
        b_average = tl.load(average_ptr + b_slot, mask=m_t, other=0.0)
        b_average = decay * b_average + (1 - decay) * b_count * share
        b_average = tl.where(o_t == live_len - 1, 1.0, b_average)
        tl.store(average_ptr + b_slot, b_average, mask=m_t)
        tl.store(counts_ptr + b_slot, 0, mask=m_t)


def update_averages(
    slots: torch.Tensor,
    indptr: torch.Tensor,
    prompt_lens: torch.Tensor,
    live_lens: torch.Tensor,
    counted: torch.Tensor,
    counts: torch.Tensor,
    average: torch.Tensor,
    selectors: int,
    decay: float,
) -> None:
    """Fold the counts of a step into the averages of every lane that counts its selections.

    Args:
        slots: Slots of the live tokens, lane after lane, int32.
        indptr: Start of each lane in ``slots``, ``[B + 1]``, int32.
        prompt_lens: Leading tokens of each lane without an average, ``[B]``, int32.
        live_lens: Tokens of each lane that have a slot, ``[B]``, int32.
        counted: 1 for lanes that count their selections, else 0, ``[B]``, int32.
        counts: Selections of the step per slot, ``[num_slots]``, int32. Those of the averaged
            tokens are reset to 0.
        average: Per slot, ``[num_slots]``, float32. That of a lane's last token, the current one,
            becomes 1.
        selectors: (layer, KV head) pairs that selected in the step.
        decay: Weight of the old average.

    Reference: :meth:`fasa_sglang.pruning.importance.Importance.end_step`.
    """
    _average_kernel[(SPLITS, len(live_lens))](
        slots,
        indptr,
        prompt_lens,
        live_lens,
        counted,
        counts,
        average,
        1 / selectors,
        decay,
        BT=512,
        num_warps=4,
    )
