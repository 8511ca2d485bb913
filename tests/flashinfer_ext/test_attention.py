"""FlashInfer's decode over chosen tokens, planned once, its lengths changed on the device."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim", "dtype"),
    [
        pytest.param(8, 4, 128, torch.bfloat16, id="HKV8-G4-D128-bf16"),
        pytest.param(2, 7, 64, torch.bfloat16, id="HKV2-G7-D64-bf16"),
        pytest.param(3, 3, 64, torch.bfloat16, id="HKV3-G3-D64-bf16"),
    ],
)
def test_lengths_change_between_replays_of_one_graph(
    num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Lengths around FlashInfer's chunk borders; indices past a row's length are poison."""
    from fasa_sglang.flashinfer_ext.attention import FocusedAttention

    torch.manual_seed(0)
    batch_size, max_tokens, num_slots = 5, 512, 3000
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    sm_scale = head_dim**-0.5
    attention = FocusedAttention(
        batch_size,
        num_kv_heads * group,
        num_kv_heads,
        head_dim,
        max_tokens,
        dtype,
        workspace,
        sm_scale,
    )
    like = {"device": "cuda", "dtype": dtype}
    q = torch.randn(batch_size, num_kv_heads * group, head_dim, **like)
    k, v = (torch.randn(num_slots, num_kv_heads, head_dim, **like) for _ in range(2))
    out = torch.empty_like(q)
    attention.set_lengths(torch.full((attention.rows,), max_tokens, dtype=torch.int32).cuda())
    attention.run(q, k, v, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.run(q, k, v, out)
    borders = [1, 2, 63, 64, 127, 128, 129, 255, 256, 257, 383, 500, 511, 512]
    for shift in range(3):
        lengths = torch.tensor(
            [borders[(row + 5 * shift) % len(borders)] for row in range(attention.rows)],
            dtype=torch.int32,
            device="cuda",
        )
        slots = torch.rand(attention.rows, num_slots - 1, device="cuda").argsort(dim=-1) + 1
        heads = torch.arange(attention.rows, device="cuda")[:, None] % num_kv_heads
        attention.indices.copy_(slots[:, :max_tokens] * num_kv_heads + heads)
        attention.set_lengths(lengths)
        out.fill_(torch.nan)
        graph.replay()
        for row, length in enumerate(lengths.tolist()):
            b, h = divmod(row, num_kv_heads)
            chosen = slots[row, :length]
            queries = q[b, h * group : (h + 1) * group].float()
            weights = (queries @ k[chosen, h].float().T * sm_scale).softmax(dim=-1)
            expected = weights @ v[chosen, h].float()
            got = out[b, h * group : (h + 1) * group].float()
            error = (got - expected).norm() / expected.norm()
            assert error < 0.01, (row, length, float(error))
