"""The kernel of attention sinks against attention that has them."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import DEVICE, needs_triton

from fasa_sglang.ops import reference

pytestmark = needs_triton


@pytest.mark.parametrize(
    ("num_tokens", "num_kv_heads", "group", "head_dim"),
    [(1, 8, 8, 64), (3, 2, 7, 64), (5, 1, 1, 128), (2, 3, 5, 256)],
)
@pytest.mark.parametrize("level", [-50.0, 3.0, 50.0])
def test_apply_sink_logits_equals_attention_with_sinks(
    num_tokens: int, num_kv_heads: int, group: int, head_dim: int, level: float
) -> None:
    """From sinks without weight to sinks that take all of it."""
    from fasa_sglang.ops.sink_logits import apply_sink_logits

    generator = torch.Generator().manual_seed(0)
    num_qo_heads, num_keys, sm_scale = num_kv_heads * group, 33, head_dim**-0.5
    q = torch.randn(num_tokens, num_qo_heads, head_dim, generator=generator)
    k, v = torch.randn(2, num_keys, num_kv_heads, head_dim, generator=generator)
    sinks = (level + torch.randn(num_qo_heads, generator=generator)).bfloat16()
    slots = torch.arange(num_keys).expand(num_tokens, -1)
    positions = slots[:, None].expand(-1, num_kv_heads, -1)
    attention = (q, k, v, slots, positions)
    out = reference.focused_attention(*attention, sm_scale=sm_scale).to(DEVICE)
    lengths = torch.full((num_tokens,), num_keys)
    logits = reference.attention_logits(q, k, slots, lengths, sm_scale)
    lse = logits.logsumexp(dim=-1).flatten(1, 2) / math.log(2)
    apply_sink_logits(out, lse.contiguous().to(DEVICE), sinks.to(DEVICE))
    expected = reference.focused_attention(*attention, sm_scale=sm_scale, sink_logits=sinks)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
