"""FASA's token importance on the GPU: one pass over the label cache.

A program reads the labels of several neighbouring KV heads at once, all heads of most models, so
that each token costs one contiguous read, and writes one score per KV head.
Reference: ``ops.reference.token_importance``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fasa_sglang.ops import reference
from fasa_sglang.ops.layer_labels import LayerLabels

# Programs that a batch is divided into: three for each multiprocessor of an H100.
NUM_PROGRAMS = 132 * 3
# Tokens of a tile, and the most label dims of a token that a program reads. Together they bound a
# tile to 64 KiB of float16, which fits the shared memory of every GPU since sm_80.
TILE_TOKENS = 64
MAX_ROW = 512
# Score of a token that is always selected.
FORCED = float("inf")
BITS_PER_NAT = 1 / math.log(2)


@triton.jit
def _importance_kernel(
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
    HB: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BT: tl.constexpr,
    MEAN: tl.constexpr,
    FORCED: tl.constexpr,
    ANCHORS: tl.constexpr,
    FIRST: tl.constexpr,
    MOST: tl.constexpr,
):
    i_s, i_b = tl.program_id(0), tl.program_id(1)
    # First head of this program; a constant where one block holds all heads.
    i_h = tl.program_id(2) * HB if HB < H else 0
    # Both loads come before the branch, so that their latencies overlap.
    seq_len, start = tl.load(seq_lens_ptr + i_b), tl.load(starts_ptr + i_b)
    if i_s * BT >= seq_len:
        return
    sink, recent = tl.load(sinks_ptr + i_b), tl.load(recents_ptr + i_b)
    o_h, o_f, o_g = i_h + tl.arange(0, HB), tl.arange(0, FP), tl.arange(0, GP)
    o_hf = o_h[:, None] * F + o_f[None, :]
    m_hf = (o_h < H)[:, None] & (o_f < F)[None, :]
    b_dim = tl.load(dims_ptr + o_hf, mask=m_hf, other=0)[:, :, None]
    p_q = q_ptr + i_b.to(tl.int64) * q_stride + (o_h[:, None] * G + o_g[None, :])[:, None, :] * D
    m_q = m_hf[:, :, None] & (o_g < G)[None, None, :]
    b_q = tl.load(p_q + b_dim, mask=m_q, other=0.0).to(tl.float32)
    b_q *= (tl.load(q_scale_ptr + o_hf, mask=m_hf, other=0.0) * sm_scale)[:, :, None]
    if MEAN:
        b_q = tl.sum(b_q, axis=2, keep_dims=True) / G
    b_q = b_q.to(tl.float16)  # [HB, FP, GP or 1]
    o_r = tl.arange(0, HB * FP)
    m_r = ((i_h + o_r // FP < H) & (o_r % FP < F))[None, :]
    o_r = ((i_h + o_r // FP) * F + o_r % FP)[None, :]
    p_slot = slots_ptr + start

    if not MEAN:
        o_a = tl.arange(0, ANCHORS)
        o_a = tl.where(o_a < FIRST, o_a, seq_len - 1 - ANCHORS + o_a)
        o_a = tl.minimum(tl.maximum(o_a, 0), tl.maximum(seq_len - 2, 0))
        p_anchor = labels_ptr + tl.load(p_slot + o_a).to(tl.int64)[:, None] * (H * F) + o_r
        b_anchor = tl.load(p_anchor, mask=m_r, other=0.0).to(tl.float16)
        b_anchor = tl.permute(tl.reshape(b_anchor, [ANCHORS, HB, FP]), (1, 0, 2))
        b_peak = tl.max(tl.dot(b_anchor, b_q), axis=1)[:, None, :]
        b_start = tl.broadcast_to(-b_peak, [HB, BT, GP])

    for i_t in range(i_s, tl.cdiv(seq_len, BT), tl.num_programs(0)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < seq_len
        b_slot = tl.load(p_slot + o_t, mask=m_t, other=0).to(tl.int64)
        p_label = labels_ptr + b_slot[:, None] * (H * F) + o_r
        # [BT, HB * FP]; past the end slot 0 is read and masked later
        if H % HB == 0 and FP == F:
            b_label = tl.load(p_label)
        else:
            b_label = tl.load(p_label, mask=m_r, other=0.0)
        b_label = tl.permute(tl.reshape(b_label.to(tl.float16), [BT, HB, FP]), (1, 0, 2))
        if MEAN:
            b_score = tl.sum(tl.dot(b_label, b_q), axis=2)  # [HB, BT]
        else:
            b_mass = tl.exp2(tl.minimum(tl.dot(b_label, b_q, acc=b_start), MOST))  # [HB, BT, GP]
            if G != GP:
                b_mass = tl.where((o_g < G)[None, None, :], b_mass, 0.0)
            # Masses span many decades, so store a logarithm. A float's bits are one that is linear
            # between powers of two: it keeps the order, and the exact one would take a quarter of
            # this loop's time.
            b_bits = tl.sum(b_mass, axis=2).to(tl.int32, bitcast=True)
            b_score = b_bits.to(tl.float32) * (1 / 2**23) - 127.0
        m_free = ((o_t >= sink) & (o_t < seq_len - recent))[None, :]
        p_score = scores_ptr + (i_b * H + o_h).to(tl.int64)[:, None] * scores_stride + o_t[None, :]
        b_score = tl.where(m_free, b_score, FORCED)
        tl.store(p_score, b_score, mask=m_t[None, :] & (o_h < H)[:, None])


class ScoreBuffers:
    """The output of a scoring pass, allocated once and reused by every layer and step.

    Args:
        max_batch_size: Largest number of requests in a batch.
        num_kv_heads: KV heads of this rank.
        max_len: Length of the longest request, in tokens.
        combine: ``mean`` or ``nrm``.
        device: Device of the kernels.

    Attributes:
        scores: ``[max_batch_size * HKV, max_len]``, float16, rows aligned to 16 bytes. Entries
            from a request's length on are undefined. The rounding error of float16 is smaller than
            that of the labels.
    """

    def __init__(
        self,
        max_batch_size: int,
        num_kv_heads: int,
        max_len: int,
        combine: str,
        device: torch.device | str,
    ) -> None:
        rows, aligned = max_batch_size * num_kv_heads, triton.cdiv(max_len, 8) * 8
        self.combine = combine
        self.scores = torch.empty(rows, aligned, dtype=torch.float16, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.scores.nbytes


def token_importance(
    q: torch.Tensor,
    labels: LayerLabels,
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
        labels: The layer's labels.
        slots: Position to slot, request after request, ``[>= total tokens]``, int32.
        starts: Start of each request's slots, ``[>= B]``, int32.
        seq_lens: Tokens of each request, ``[B]``, int32; the last one has no label yet.
        sinks: First tokens of each request that are always selected, ``[B]``, int32.
        recents: Last tokens that are always selected, at least one, ``[B]``, int32.
        buffers: Receives the scores; always-selected tokens score ``FORCED``.
            ``nrm`` scores are a monotone function of the reference's: a logarithm to base 2 at
            powers of two, linear between them.
        sm_scale: Multiplies ``q @ k``.

    Reference: :func:`fasa_sglang.ops.reference.token_importance`.
    """
    batch_size, num_qo_heads, head_dim = q.shape
    _, num_kv_heads, width = labels.cache.shape
    group = num_qo_heads // num_kv_heads
    mean = buffers.combine == "mean"
    padded_width = max(16, triton.next_power_of_2(width))  # tl.dot sums over 16 dims at least
    block_heads = min(triton.next_power_of_2(num_kv_heads), max(1, MAX_ROW // padded_width))
    head_blocks = triton.cdiv(num_kv_heads, block_heads)
    splits = max(1, NUM_PROGRAMS // (batch_size * head_blocks))
    _importance_kernel[(splits, batch_size, head_blocks)](
        q,
        labels.cache,
        labels.dims,
        labels.scale,
        slots,
        starts,
        seq_lens,
        sinks,
        recents,
        buffers.scores,
        sm_scale if mean else sm_scale * BITS_PER_NAT,
        q.stride(0),
        buffers.scores.stride(0),
        H=num_kv_heads,
        HB=block_heads,
        G=group,
        GP=triton.next_power_of_2(group),
        D=head_dim,
        F=width,
        FP=padded_width,
        BT=TILE_TOKENS,
        MEAN=mean,
        FORCED=FORCED,
        ANCHORS=reference.NUM_ANCHORS,
        FIRST=reference.FIRST_ANCHORS,
        MOST=reference.MOST_ABOVE_ANCHORS * BITS_PER_NAT,
        num_warps=8,
        num_stages=2,
    )
