"""Queries are taken at the sampled positions, however the text is cut into chunks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fasa_sglang.backend.attention.query_samples import QuerySamples

TOKENS, HEADS, DIM = 50, 3, 4
POSITIONS = torch.tensor([0, 7, 16, 17, 31, 32, 49])


@pytest.mark.parametrize("chunk", [1, 16, 17, 50, 64])
def test_take_in_chunks_gives_the_queries_at_the_positions(chunk: int) -> None:
    """Rows past the end of a chunk are padding; each layer has its own queries."""
    samples = QuerySamples(POSITIONS)
    queries = torch.randn(2, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    layers = [
        SimpleNamespace(layer_id=i, tp_q_head_num=HEADS, qk_head_dim=DIM, scaling=0.5 + i)
        for i in (4, 9)
    ]
    for start in range(0, TOKENS, chunk):
        part = queries[:, start : start + chunk]
        batch = SimpleNamespace(extend_prefix_lens_cpu=[start], extend_seq_lens_cpu=[part.shape[1]])
        for layer, q in zip(layers, part, strict=True):
            padded = torch.cat((q.flatten(1), torch.full((3, HEADS * DIM), torch.nan)))
            samples.take(layer, padded, batch)
    for layer, q in zip((4, 9), queries, strict=True):
        assert torch.equal(samples.of_layer(layer), q[POSITIONS].transpose(0, 1))
    assert samples.sm_scales == {4: 4.5, 9: 9.5}
