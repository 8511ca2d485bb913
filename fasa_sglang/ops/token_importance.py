"""FASA's token importance on the GPU: one pass over the label cache, all KV heads at once.

A program reads whole label rows, so that each token costs one contiguous read, and writes one
score per KV head. Reference: ``ops.reference.token_importance``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Programs a batch is cut into: enough to fill an H100's 132 processors eight deep.
NUM_PROGRAMS = 132 * 8
# Score of a token that is always selected.
FORCED = float("inf")


@triton.jit
def _order_key(b_x):
    """Map float32 to int32 in the same order."""
    b_key = b_x.to(tl.int32, bitcast=True)
    return b_key ^ ((b_key >> 31) & 0x7FFFFFFF)


@triton.jit
def _group_query(
    q_ptr,
    dims_ptr,
    q_scale_ptr,
    o_r,
    i_g,
    G: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    m_r,
):
    """The dominant dims of query head ``i_g`` of every group, in the labels' units, ``[ROW]``."""
    i_h, o_f = o_r // FP, o_r % FP
    b_dim = tl.load(dims_ptr + i_h * F + o_f, mask=m_r, other=0)
    b_q = tl.load(q_ptr + (i_h * G + i_g) * D + b_dim, mask=m_r, other=0.0).to(tl.float32)
    return b_q * tl.load(q_scale_ptr + i_h * F + o_f, mask=m_r, other=0.0)


@triton.jit
def _mean_kernel(
    q_ptr,
    labels_ptr,
    dims_ptr,
    q_scale_ptr,
    slots_ptr,
    starts_ptr,
    seq_lens_ptr,
    sinks_ptr,
    recents_ptr,
    scores_ptr,
    sm_scale,
    q_stride,
    scores_stride,
    H: tl.constexpr,
    HP: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BT: tl.constexpr,
    FORCED: tl.constexpr,
):
    i_s, i_b = tl.program_id(0), tl.program_id(1)
    # Before the branch, so that the two loads wait together.
    seq_len, start = tl.load(seq_lens_ptr + i_b), tl.load(starts_ptr + i_b)
    if i_s * BT >= seq_len:
        return
    sink, recent = tl.load(sinks_ptr + i_b), tl.load(recents_ptr + i_b)
    o_r, o_h = tl.arange(0, HP * FP), tl.arange(0, HP)
    i_h, o_f = o_r // FP, o_r % FP
    m_r = (i_h < H) & (o_f < F)
    b_q = tl.zeros([HP * FP], tl.float32)
    for i_g in range(G):
        b_q += _group_query(
            q_ptr + i_b.to(tl.int64) * q_stride, dims_ptr, q_scale_ptr, o_r, i_g, G, D, F, FP, m_r
        )
    b_q *= sm_scale / G
    # Slots are under way one tile ahead, or every label would wait for two loads in a row.
    p_slot = slots_ptr + start
    o_next = i_s * BT + tl.arange(0, BT)
    b_next = tl.load(p_slot + o_next, mask=o_next < seq_len, other=0)
    for i_t in range(i_s, tl.cdiv(seq_len, BT), tl.num_programs(0)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < seq_len
        p_label = labels_ptr + b_next.to(tl.int64)[:, None] * (H * F) + (i_h * F + o_f)[None, :]
        o_next = o_t + tl.num_programs(0) * BT
        b_next = tl.load(p_slot + o_next, mask=o_next < seq_len, other=0)
        if HP == H and FP == F:
            b_label = tl.load(p_label)  # [BT, ROW]; slot 0 stands in for what is past the end
        else:
            b_label = tl.load(p_label, mask=m_r[None, :], other=0.0)
        b_part = tl.reshape(b_label.to(tl.float32) * b_q[None, :], [BT, HP, FP])
        b_score = tl.sum(b_part, axis=2)  # [BT, HP]
        m_free = ((o_t >= sink) & (o_t < seq_len - recent))[:, None]
        p_score = scores_ptr + (i_b * H + o_h).to(tl.int64)[None, :] * scores_stride + o_t[:, None]
        b_score = tl.where(m_free, b_score, FORCED)
        tl.store(p_score, b_score, mask=m_t[:, None] & (o_h < H)[None, :])


@triton.jit
def _head_logits_kernel(
    q_ptr,
    labels_ptr,
    dims_ptr,
    q_scale_ptr,
    slots_ptr,
    starts_ptr,
    seq_lens_ptr,
    logits_ptr,
    peaks_ptr,
    sm_scale,
    q_stride,
    logits_stride,
    H: tl.constexpr,
    HP: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BT: tl.constexpr,
    QP: tl.constexpr,
):
    i_s, i_b = tl.program_id(0), tl.program_id(1)
    # Before the branch, so that the two loads wait together.
    seq_len, start = tl.load(seq_lens_ptr + i_b), tl.load(starts_ptr + i_b)
    if i_s * BT >= seq_len:
        return
    # Query heads as columns that are zero outside their KV head's part of the row, so that one
    # matrix product scores them all.
    o_r, o_q = tl.arange(0, HP * FP)[:, None], tl.arange(0, QP)[None, :]
    i_h, o_f = o_r // FP, o_r % FP
    m_q = (i_h < H) & (o_f < F) & (o_q // G == i_h)
    b_dim = tl.load(dims_ptr + i_h * F + o_f, mask=(i_h < H) & (o_f < F), other=0)
    p_q = q_ptr + i_b.to(tl.int64) * q_stride + o_q * D + b_dim
    b_q = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32) * sm_scale
    b_q *= tl.load(q_scale_ptr + i_h * F + o_f, mask=(i_h < H) & (o_f < F), other=0.0)
    b_q = b_q.to(tl.float16)  # [ROW, QP]
    o_row = tl.arange(0, HP * FP)
    m_row = (o_row // FP < H) & (o_row % FP < F)
    o_row = (o_row // FP) * F + o_row % FP
    b_peak = tl.full([BT, QP], float("-inf"), tl.float32)
    for i_t in range(i_s, tl.cdiv(seq_len, BT), tl.num_programs(0)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < seq_len
        p_slot = slots_ptr + start + o_t
        b_slot = tl.load(p_slot, mask=m_t, other=0).to(tl.int64)
        p_label = labels_ptr + b_slot[:, None] * (H * F) + o_row[None, :]
        if HP == H and FP == F:
            b_label = tl.load(p_label)  # [BT, ROW]
        else:
            b_label = tl.load(p_label, mask=m_row[None, :], other=0.0)
        b_logit = tl.dot(b_label.to(tl.float16), b_q)  # [BT, QP]
        m_labelled = (o_t < seq_len - 1)[:, None]
        b_peak = tl.maximum(b_peak, tl.where(m_labelled, b_logit, float("-inf")))
        p_logit = logits_ptr + (i_b * H * G + o_q).to(tl.int64) * logits_stride + o_t[:, None]
        tl.store(p_logit, b_logit.to(tl.float16), mask=m_t[:, None] & (o_q < H * G))
    o_p = tl.arange(0, QP)
    b_key = _order_key(tl.max(b_peak, axis=0))
    tl.atomic_max(peaks_ptr + i_b * H * G + o_p, b_key, mask=o_p < H * G, sem="relaxed")


@triton.jit
def _nrm_kernel(
    logits_ptr,
    peaks_ptr,
    seq_lens_ptr,
    sinks_ptr,
    recents_ptr,
    scores_ptr,
    logits_stride,
    scores_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    BT: tl.constexpr,
    FORCED: tl.constexpr,
):
    i_s, i_r = tl.program_id(0), tl.program_id(1)
    i_b = i_r // H
    seq_len = tl.load(seq_lens_ptr + i_b)
    if i_s * BT >= seq_len:
        return
    sink, recent = tl.load(sinks_ptr + i_b), tl.load(recents_ptr + i_b)
    for i_t in range(i_s, tl.cdiv(seq_len, BT), tl.num_programs(0)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < seq_len
        b_mass = tl.zeros([BT], tl.float32)
        for i_g in range(G):
            i_q = (i_r * G + i_g).to(tl.int64)
            peak = tl.load(peaks_ptr + i_q)
            peak = (peak ^ ((peak >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            b_logit = tl.load(logits_ptr + i_q * logits_stride + o_t, mask=m_t, other=0.0)
            b_mass += tl.exp(b_logit.to(tl.float32) - peak)
        # The logarithm ranks alike and spreads the masses, which span many decades.
        b_score = tl.log(tl.maximum(b_mass, 1e-37))
        m_free = (o_t >= sink) & (o_t < seq_len - recent)
        p_score = scores_ptr + i_r.to(tl.int64) * scores_stride + o_t
        tl.store(p_score, tl.where(m_free, b_score, FORCED), mask=m_t)


class ScoreBuffers:
    """What one scoring pass writes; made once, reused by every layer and step.

    Args:
        max_batch_size: Most requests of a batch.
        num_qo_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        max_len: Longest request, in tokens.
        combine: ``mean`` or ``nrm``; ``nrm`` needs one more row per query head.
        device: Where the kernels run.

    Attributes:
        scores: ``[max_batch_size * HKV, max_len]`` float16, rows aligned to 16 bytes. Beyond a
            request's length its rows keep what they held. What float16 rounds off is less than
            what labels of 8 or 16 bits have lost before.
    """

    def __init__(
        self,
        max_batch_size: int,
        num_qo_heads: int,
        num_kv_heads: int,
        max_len: int,
        combine: str,
        device: torch.device | str,
    ) -> None:
        rows, aligned = max_batch_size * num_kv_heads, triton.cdiv(max_len, 8) * 8
        self.combine = combine
        self.scores = torch.empty(rows, aligned, dtype=torch.float16, device=device)
        if combine == "nrm":
            heads = max_batch_size * num_qo_heads
            self.logits = torch.empty(heads, aligned, dtype=torch.float16, device=device)
            self.peaks = torch.empty(heads, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, torch.Tensor))


def token_importance(
    q: torch.Tensor,
    label_cache: torch.Tensor,
    dominant_dims: torch.Tensor,
    label_scale: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor,
    recents: torch.Tensor,
    buffers: ScoreBuffers,
    *,
    sm_scale: float,
) -> None:
    """Score every cached token with the dominant frequency chunks: FASA's TIP.

    Nothing is allocated and nothing synchronises, so the call can be captured in a CUDA graph;
    lengths, slots, sinks and recents may change between replays.

    Args:
        q: Decode queries after RoPE, ``[B, HQ, D]``, float16 or bfloat16, heads contiguous.
        label_cache: ``[num_slots, HKV, F]``, as ``write_labels`` leaves it.
        dominant_dims: Head dims a label holds, ``[HKV, F]``, int32.
        label_scale: As given to ``write_labels``, ``[HKV, F]``, float32.
        slots: Position to slot, request after request, ``[>= all tokens]``, int32.
        starts: Where each request's slots begin, ``[>= B]``, int32.
        seq_lens: Tokens of each request, ``[B]``, int32; the last one has no label yet.
        sinks: First tokens of each request that are always selected, ``[B]``, int32.
        recents: Last tokens that are always selected, at least one, ``[B]``, int32.
        buffers: Receives the scores; always-selected tokens score ``FORCED``.
            ``nrm`` scores are the logarithm of the reference's, which ranks alike.
        sm_scale: Multiplies ``q @ k``.

    Reference: :func:`fasa_sglang.ops.reference.token_importance`.
    """
    batch_size, num_qo_heads, head_dim = q.shape
    _, num_kv_heads, width = label_cache.shape
    splits = max(1, NUM_PROGRAMS // batch_size)
    shape = {
        "H": num_kv_heads,
        "HP": triton.next_power_of_2(num_kv_heads),
        "G": num_qo_heads // num_kv_heads,
        "D": head_dim,
        "F": width,
        "FP": triton.next_power_of_2(width),
    }
    inputs = (q, label_cache, dominant_dims, label_scale, slots, starts, seq_lens)
    if buffers.combine == "mean":
        _mean_kernel[(splits, batch_size)](
            *inputs,
            sinks,
            recents,
            buffers.scores,
            sm_scale,
            q.stride(0),
            buffers.scores.stride(0),
            **shape,
            BT=32,
            FORCED=FORCED,
            num_warps=4,
        )
        return
    buffers.peaks.fill_(-(2**31))
    _head_logits_kernel[(splits, batch_size)](
        *inputs,
        buffers.logits,
        buffers.peaks,
        sm_scale,
        q.stride(0),
        buffers.logits.stride(0),
        **shape,
        BT=64,
        QP=max(16, triton.next_power_of_2(num_qo_heads)),
        num_warps=4,
    )
    rows = batch_size * num_kv_heads
    _nrm_kernel[(max(1, NUM_PROGRAMS // rows), rows)](
        buffers.logits,
        buffers.peaks,
        seq_lens,
        sinks,
        recents,
        buffers.scores,
        buffers.logits.stride(0),
        buffers.scores.stride(0),
        H=num_kv_heads,
        G=shape["G"],
        BT=1024,
        FORCED=FORCED,
        num_warps=4,
    )
