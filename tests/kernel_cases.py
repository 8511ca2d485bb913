"""Random inputs of the GPU kernels, and what holds for every selection.

On a machine without a GPU the small cases run in Triton's interpreter, which has to be chosen
before Triton is imported: ``TRITON_INTERPRET=1 pytest tests/ops``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from fasa_sglang.ops import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA GPU or TRITON_INTERPRET=1",
)


@dataclass
class Case:
    """Random inputs; slots that no request owns hold NaN labels.

    ``slots`` is what the reference takes, ``packed`` and ``starts`` what the kernels take.
    """

    q: torch.Tensor
    k: torch.Tensor
    dims: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    slots: torch.Tensor
    packed: torch.Tensor
    starts: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def sm_scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def ints(self, value: int) -> torch.Tensor:
        return torch.full_like(self.seq_lens, value)


def make_case(
    seq_lens: tuple[int, ...], num_kv_heads: int, group: int, head_dim: int, width: int
) -> Case:
    generator = torch.Generator(DEVICE).manual_seed(0)
    like = {"generator": generator, "device": DEVICE}
    num_slots = 1 + sum(seq_lens) + 10
    permuted = (torch.randperm(num_slots - 1, **like) + 1).int()
    slots = torch.full((len(seq_lens), max(seq_lens)), 10**9, dtype=torch.int32, device=DEVICE)
    packed = permuted[: sum(seq_lens)]
    for row, part in zip(slots, packed.split(list(seq_lens)), strict=True):
        row[: len(part)] = part
    k = torch.randn(num_slots, num_kv_heads, head_dim, **like).bfloat16()
    q = torch.randn(len(seq_lens), num_kv_heads * group, head_dim, **like).bfloat16()
    dims = torch.rand(num_kv_heads, head_dim, **like).argsort(dim=-1)[:, :width].int()
    mean = torch.randn(num_kv_heads, width, **like)
    scale = torch.rand(num_kv_heads, width, **like) + 0.5
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    starts = (lens.cumsum(0) - lens).int()
    return Case(q, k, dims, mean, scale, slots, packed, starts, lens)


def written_labels(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Labels of the second of two layers; the first one has other keys, dims and scales."""
    from fasa_sglang.ops.label_write import KeyPool, write_labels

    num_slots, num_kv_heads, _ = case.k.shape
    shape = (2, num_slots, num_kv_heads, case.dims.shape[1])
    labels = torch.full(shape, torch.nan, device=DEVICE).to(dtype)
    layers = (
        torch.stack([case.dims.flip(-1), case.dims]),
        torch.stack([case.mean + 1, case.mean]),
        torch.stack([case.scale * 2, case.scale]),
    )
    other = torch.full_like(case.k, 5.0)
    # In two calls and out of order, as chunks of prompts and decode steps write them.
    for part in case.packed.flip(0).tensor_split(2):
        write_labels(KeyPool([other, case.k]), *layers, part, labels)
    owned = case.packed.long()
    expected = reference.pack_labels(
        other[owned], layers[0][0].long(), layers[1][0], layers[2][0], dtype
    )
    torch.testing.assert_close(labels[0].float()[owned], expected.float(), rtol=0.13, atol=1e-2)
    # Scoring reads slot 0 for what is past a request's end, and masks it.
    labels[1, 0] = 0
    return labels[1]


def scored(case: Case, labels: torch.Tensor, combine: str, sink: int, recent: int):
    from fasa_sglang.ops.token_importance import ScoreBuffers, token_importance

    size = (len(case.q), labels.shape[1], case.slots.shape[1])
    buffers = ScoreBuffers(*size, combine, DEVICE)
    buffers.scores.fill_(torch.nan)
    token_importance(
        case.q,
        labels,
        case.dims,
        case.scale,
        case.packed,
        case.starts,
        case.seq_lens,
        case.ints(sink),
        case.ints(recent),
        buffers,
        sm_scale=case.sm_scale,
    )
    return buffers


def check_selection(case: Case, buffers, indices: torch.Tensor, budgets: list[int], forced) -> None:
    """Every row holds distinct tokens of its request, none worse than one left out."""
    sink, recent = forced
    num_kv_heads = case.dims.shape[0]
    for b, seq_len in enumerate(case.seq_lens.tolist()):
        position = torch.full((len(case.k),), -1, device=DEVICE)
        position[case.slots[b, :seq_len].long()] = torch.arange(seq_len, device=DEVICE)
        for h in range(num_kv_heads):
            row = b * num_kv_heads + h
            kept = min(budgets[b], seq_len)
            index = indices[row, :kept].long()
            assert (index % num_kv_heads == h).all()
            positions = position[index // num_kv_heads]
            assert (positions >= 0).all()
            chosen = torch.zeros(seq_len, dtype=torch.bool, device=DEVICE)
            chosen[positions] = True
            assert int(chosen.sum()) == kept
            assert chosen[:sink].all() and chosen[max(0, seq_len - recent) :].all()
            if kept < seq_len:
                score = buffers.scores[row, :seq_len]
                assert score[chosen].min() >= score[~chosen].max()
            assert (indices[row, kept:] == -7).all()
