"""FlashInfer's paged decode, planned once, with lengths that change on the device."""

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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, h: int, sm_scale: float
) -> torch.Tensor:
    """Float32 attention of one group of queries over some slots of one KV head."""
    weights = (q.float() @ k[slots, h].float().T * sm_scale).softmax(dim=-1)
    return weights @ v[slots, h].float()


@pytest.mark.parametrize(NAMES, CASES)
def test_selected_decode_in_a_graph_follows_the_lengths_on_the_device(
    num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Lengths around FlashInfer's chunk borders; indices past a row's length are other tokens.

    The plan is renewed between replays as well, for exactly the lengths of the step.
    """
    from fasa_sglang.flashinfer_ext.shrinkable_decode import SelectedDecode

    torch.manual_seed(0)
    batch_size, max_tokens, num_slots = 5, 512, 3000
    rows = batch_size * num_kv_heads
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    sm_scale = 0.7 * head_dim**-0.5
    indices = torch.zeros(rows, max_tokens, dtype=torch.int32, device="cuda")
    last_page_len = torch.ones(rows, dtype=torch.int32, device="cuda")
    attention = SelectedDecode(
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
        kv_heads = torch.arange(rows, device="cuda")[:, None] % num_kv_heads
        indices.copy_(slots[:, :max_tokens] * num_kv_heads + kv_heads)
        last_page_len.copy_(torch.tensor(lengths) - max_tokens + 1)
        # Alternate between the exact lengths and the longest possible ones.
        attention.plan(lengths if shift % 2 else [max_tokens] * rows)
        out.fill_(torch.nan)
        graph.replay()
        for row, length in enumerate(lengths):
            b, h = divmod(row, num_kv_heads)
            heads = slice(h * group, (h + 1) * group)
            got = out[b, heads].float()
            if length == 0:
                assert (got == 0).all()
                continue
            expected = attend(q[b, heads], k, v, slots[row, :length], h, sm_scale)
            error = (got - expected).norm() / expected.norm()
            assert error < 0.01, (row, length, float(error))


@pytest.mark.parametrize(NAMES, CASES[:3])
def test_prefix_and_selected_passes_merge_to_attention_over_both(
    num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Lanes that are all prefix, all selected, or both."""
    import flashinfer

    from fasa_sglang.flashinfer_ext.shrinkable_decode import SelectedDecode, ShrinkableDecode

    torch.manual_seed(0)
    seq_lens, prefix_lens = [700, 300, 900], [700, 0, 400]
    selected_lens, max_tokens = [0, 128, 100], 160
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
    tokens: list[list[torch.Tensor]] = []
    for b in range(3):
        lane = slots[int(indptr[b]) : int(indptr[b + 1])]
        tokens.append([])
        for h in range(num_kv_heads):
            free = torch.arange(prefix_lens[b], seq_lens[b], **on_gpu)
            positions = free[torch.randperm(len(free), **on_gpu)[: selected_lens[b]]]
            indices[b * num_kv_heads + h, : selected_lens[b]] = lane[positions] * num_kv_heads + h
            tokens[b].append(torch.cat([lane[: prefix_lens[b]], lane[positions]]).long())
    row_lens = torch.tensor(selected_lens, dtype=torch.int32, **on_gpu)
    row_lens = row_lens.repeat_interleave(num_kv_heads)
    selected = SelectedDecode(indices, row_lens - max_tokens + 1, *heads, dtype, workspace)
    last_page_len = torch.tensor(prefix_lens, dtype=torch.int32, **on_gpu) - indptr.diff() + 1
    prefix = ShrinkableDecode(indptr, slots, last_page_len, *heads, dtype, workspace)
    selected.plan([length for length in selected_lens for _ in range(num_kv_heads)])
    prefix.plan(prefix_lens)

    out, prefix_out = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    lse, prefix_lse = torch.full((2, 3, num_qo_heads), torch.nan, **on_gpu)
    selected.run(q, k, v, out, sm_scale, lse)
    prefix.run(q, k, v, prefix_out, sm_scale, prefix_lse)
    flashinfer.merge_state_in_place(out, lse, prefix_out, prefix_lse)
    for b in range(3):
        for h in range(num_kv_heads):
            own = slice(h * group, (h + 1) * group)
            expected = attend(q[b, own], k, v, tokens[b][h], h, sm_scale)
            error = (out[b, own].float() - expected).norm() / expected.norm()
            assert error < 0.01, (b, h, float(error))
