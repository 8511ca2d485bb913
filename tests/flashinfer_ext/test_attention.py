"""FlashInfer's decode over chosen tokens, planned once, its lengths changed on the device."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


CASES = [
    pytest.param(8, 4, 128, torch.bfloat16, id="HKV8-G4-D128-bf16"),
    pytest.param(2, 7, 64, torch.bfloat16, id="HKV2-G7-D64-bf16"),
    pytest.param(3, 3, 64, torch.bfloat16, id="HKV3-G3-D64-bf16"),
    pytest.param(1, 16, 128, torch.bfloat16, id="HKV1-G16-D128-bf16"),
    # FlashInfer compiles these two at first use.
    pytest.param(4, 1, 128, torch.float16, id="HKV4-G1-D128-fp16", marks=pytest.mark.slow),
    pytest.param(2, 8, 256, torch.bfloat16, id="HKV2-G8-D256-bf16", marks=pytest.mark.slow),
]
NAMES = ("num_kv_heads", "group", "head_dim", "dtype")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, h: int, sm_scale: float
) -> torch.Tensor:
    """Float32 attention of one group of queries over some slots of one KV head."""
    weights = (q.float() @ k[chosen, h].float().T * sm_scale).softmax(dim=-1)
    return weights @ v[chosen, h].float()


@pytest.mark.parametrize(NAMES, CASES)
def test_lengths_change_between_replays_of_one_graph(
    num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Lengths around FlashInfer's chunk borders; indices past a row's length are poison.

    The plan is renewed between replays as well, for exactly the lengths of the step.
    """
    from fasa_sglang.flashinfer_ext.attention import FocusedAttention

    torch.manual_seed(0)
    batch_size, max_tokens, num_slots = 5, 512, 3000
    rows = batch_size * num_kv_heads
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    sm_scale = 0.7 * head_dim**-0.5
    indices = torch.zeros(rows, max_tokens, dtype=torch.int32, device="cuda")
    last_page_len = torch.ones(rows, dtype=torch.int32, device="cuda")
    attention = FocusedAttention(
        indices, last_page_len, num_kv_heads * group, num_kv_heads, head_dim, dtype, workspace
    )
    like = {"device": "cuda", "dtype": dtype}
    q = torch.randn(batch_size, num_kv_heads * group, head_dim, **like)
    k, v = (torch.randn(num_slots, num_kv_heads, head_dim, **like) for _ in range(2))
    out = torch.empty_like(q)
    attention.plan([max_tokens] * rows)
    attention.run(q, k, v, out, sm_scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.run(q, k, v, out, sm_scale)
    borders = [1, 2, 63, 64, 0, 127, 128, 129, 255, 256, 257, 383, 500, 511, 512]
    for shift in range(4):
        lengths = [borders[(row + 5 * shift) % len(borders)] for row in range(rows)]
        slots = torch.rand(rows, num_slots - 1, device="cuda").argsort(dim=-1) + 1
        heads = torch.arange(rows, device="cuda")[:, None] % num_kv_heads
        indices.copy_(slots[:, :max_tokens] * num_kv_heads + heads)
        last_page_len.copy_(torch.tensor(lengths) - max_tokens + 1)
        # Now and then exactly, else for the longest that may come.
        attention.plan(lengths if shift % 2 else [max_tokens] * rows)
        out.fill_(torch.nan)
        graph.replay()
        for row, length in enumerate(lengths):
            b, h = divmod(row, num_kv_heads)
            mine = slice(h * group, (h + 1) * group)
            got = out[b, mine].float()
            if length == 0:
                assert (got == 0).all()
                continue
            expected = attend(q[b, mine], k, v, slots[row, :length], h, sm_scale)
            error = (got - expected).norm() / expected.norm()
            assert error < 0.01, (row, length, float(error))


@pytest.mark.parametrize(NAMES, CASES[:3])
def test_dense_and_focused_parts_merge(
    num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Lanes that are all dense, all selected, or both: first tokens densely, a few of the rest."""
    from fasa_sglang.flashinfer_ext.attention import (
        FocusedAttention,
        ShrinkableDecode,
        merge_attention,
    )

    torch.manual_seed(0)
    seq_lens, dense_lens, kept, max_tokens = [700, 300, 900], [700, 0, 400], [0, 128, 100], 160
    on_gpu = {"device": "cuda"}
    like = {**on_gpu, "dtype": dtype}
    num_slots, num_qo_heads = sum(seq_lens) + 1, num_kv_heads * group
    heads = (num_qo_heads, num_kv_heads, head_dim)
    q = torch.randn(3, num_qo_heads, head_dim, **like)
    k, v = (torch.randn(num_slots, num_kv_heads, head_dim, **like) for _ in range(2))
    slots = (torch.randperm(num_slots - 1, **on_gpu) + 1).int()
    indptr = torch.tensor([0, 700, 1000, 1900], dtype=torch.int32, **on_gpu)
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, **on_gpu)
    sm_scale = head_dim**-0.5

    indices = torch.zeros(3 * num_kv_heads, max_tokens, dtype=torch.int32, **on_gpu)
    chosen: list[list[torch.Tensor]] = []
    for b in range(3):
        chosen.append([])
        for h in range(num_kv_heads):
            free = torch.arange(dense_lens[b], seq_lens[b], **on_gpu)
            positions = free[torch.randperm(len(free), **on_gpu)[: kept[b]]]
            chosen[b].append(slots[int(indptr[b]) + positions])
            indices[b * num_kv_heads + h, : kept[b]] = chosen[b][h] * num_kv_heads + h
    focused_len = torch.tensor(kept, dtype=torch.int32, **on_gpu).repeat_interleave(num_kv_heads)
    focused = FocusedAttention(indices, focused_len - max_tokens + 1, *heads, dtype, workspace)
    dense_len = torch.tensor(dense_lens, dtype=torch.int32, **on_gpu)
    dense = ShrinkableDecode(indptr, slots, dense_len - indptr.diff() + 1, *heads, dtype, workspace)
    focused.plan([length for length in kept for _ in range(num_kv_heads)])
    dense.plan(dense_lens)

    out, other = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    lse, other_lse = torch.full((2, 3, num_qo_heads), torch.nan, **on_gpu)
    focused.run(q, k, v, out, sm_scale, lse)
    dense.run(q, k, v, other, sm_scale, other_lse)
    merge_attention(out, lse, other, other_lse)
    for b in range(3):
        start = int(indptr[b])
        for h in range(num_kv_heads):
            mine = slice(h * group, (h + 1) * group)
            tokens = torch.cat([slots[start : start + dense_lens[b]], chosen[b][h]])
            expected = attend(q[b, mine], k, v, tokens.long(), h, sm_scale)
            error = (out[b, mine].float() - expected).norm() / expected.norm()
            assert error < 0.01, (b, h, float(error))
