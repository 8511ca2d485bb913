"""Random inputs for the GPU kernels, and the properties that every selection has.

On a machine without a GPU the small cases run in Triton's interpreter, which has to be chosen
before Triton is imported: ``TRITON_INTERPRET=1 pytest tests/ops/test_*kernels.py``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LabelFormat
from fasa_sglang.ops.layer_labels import LayerLabels

if TYPE_CHECKING:
    from fasa_sglang.ops.token_importance import ScoreBuffers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA GPU or TRITON_INTERPRET=1",
)
# Value of index entries that a kernel must not touch.
UNTOUCHED = -7


@dataclass
class Case:
    """Random keys and queries of a decode batch.

    ``slots`` is in the reference's form, ``[B, L]``, with huge padding; ``packed`` and ``starts``
    are in the kernels' form.
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

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    def ints(self, value: int) -> torch.Tensor:
        """The same number for every request."""
        return torch.full_like(self.seq_lens, value)

    def to(self, device: str) -> Case:
        return Case(*(tensor.to(device) for tensor in vars(self).values()))


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


def layer_scale(case: Case, label_format: LabelFormat) -> torch.Tensor:
    """The scale that a label cache uses for the format."""
    return case.scale if label_format.scaled else torch.ones_like(case.scale)


def make_labels(case: Case, label_format: LabelFormat) -> LayerLabels:
    """Labels by the reference; those of slots that no request owns are NaN.

    Except those of slot 0, which scoring reads for what lies past a request's end, and masks.
    """
    scale = layer_scale(case, label_format)
    labels = label_format.pack(case.k, case.dims.long(), case.mean, scale)
    free = torch.ones(len(case.k), dtype=torch.bool, device=DEVICE)
    free[case.packed.long()] = False
    free_slots = free.nonzero()[:, 0]
    nan = torch.full((len(free_slots), *labels.shape[1:]), torch.nan, device=DEVICE)
    label_format.store(labels, free_slots, nan.to(label_format.dtype))
    labels[0] = 0
    return LayerLabels(labels, case.dims, scale, label_format)


def written_labels(case: Case, label_format: LabelFormat) -> LayerLabels:
    """The same labels by the kernel, as the second of two layers.

    The first layer has other keys, dims, means and scales, and is checked here.
    """
    from fasa_sglang.ops.label_write import KeyPool, write_labels

    num_slots, num_kv_heads, _ = case.k.shape
    scale = layer_scale(case, label_format)
    shape = (2, num_slots, num_kv_heads, case.dims.shape[1])
    labels = torch.full(shape, torch.nan, device=DEVICE).to(label_format.dtype)
    layers = (
        torch.stack([case.dims.flip(-1), case.dims]),
        torch.stack([case.mean + 1, case.mean]),
        torch.stack([scale * 2, scale]),
    )
    other = torch.full_like(case.k, 5.0)
    # In two calls and out of order, as chunks of prompts and decode steps write them.
    for part in case.packed.flip(0).tensor_split(2):
        write_labels(KeyPool([other, case.k]), *layers, part, labels, label_format)
    owned = case.packed.long()
    expected = label_format.pack(other[owned], layers[0][0].long(), layers[1][0], layers[2][0])
    got = label_format.read(labels[0], owned)
    rtol = 1.04 * torch.finfo(label_format.dtype).eps
    torch.testing.assert_close(got.float(), expected.float(), rtol=rtol, atol=1e-2)
    labels[1, 0] = 0
    return LayerLabels(labels[1], case.dims, scale, label_format)


def scored(case: Case, labels: LayerLabels, combine: str, sink: int, recent: int) -> ScoreBuffers:
    """Run the scoring kernel on buffers full of NaN."""
    from fasa_sglang.ops.token_importance import ScoreBuffers, token_importance

    size = (len(case.q), case.num_kv_heads, case.slots.shape[1])
    buffers = ScoreBuffers(*size, combine, DEVICE)
    buffers.scores.fill_(torch.nan)
    token_importance(
        case.q,
        labels,
        case.packed,
        case.starts,
        case.seq_lens,
        case.ints(sink),
        case.ints(recent),
        buffers,
        sm_scale=case.sm_scale,
    )
    return buffers


def check_scores(
    case: Case, labels: LayerLabels, buffers: ScoreBuffers, combine: str, sink: int, recent: int
) -> None:
    """Every score equals the reference's on the same labels; nothing past a request is written."""
    from fasa_sglang.ops.token_importance import FORCED

    got = buffers.scores.unflatten(0, (-1, case.num_kv_heads))
    expected = reference.token_importance(
        case.q, labels, case.slots, case.seq_lens, sm_scale=case.sm_scale, combine=combine
    )
    for b, seq_len in enumerate(case.seq_lens.tolist()):
        free = slice(min(sink, seq_len), max(sink, seq_len - recent))
        ranked = expected[b, :, free]
        if combine == "nrm":
            # The kernel's logarithm: a float32's bits, linear between powers of two.
            ranked = ranked.contiguous().view(torch.int32) / 2**23 - 127
        torch.testing.assert_close(got[b, :, free].float(), ranked, rtol=2e-3, atol=2e-3)
        assert (got[b, :, :sink][:, :seq_len] == FORCED).all()
        assert (got[b, :, max(0, seq_len - recent) : seq_len] == FORCED).all()
        assert got[b, :, seq_len:].isnan().all()


def check_selection(
    case: Case,
    buffers: ScoreBuffers,
    indices: torch.Tensor,
    budgets: list[int],
    forced: tuple[int, int],
) -> None:
    """Every row has distinct tokens of its request, none worse than one that was left out."""
    sink, recent = forced
    num_kv_heads = case.num_kv_heads
    for b, seq_len in enumerate(case.seq_lens.tolist()):
        position = torch.full((len(case.k),), -1, device=DEVICE)
        position[case.slots[b, :seq_len].long()] = torch.arange(seq_len, device=DEVICE)
        for h in range(num_kv_heads):
            row = b * num_kv_heads + h
            num_selected = min(budgets[b], seq_len)
            index = indices[row, :num_selected].long()
            assert (index % num_kv_heads == h).all()
            positions = position[index // num_kv_heads]
            assert (positions >= 0).all()
            selected = torch.zeros(seq_len, dtype=torch.bool, device=DEVICE)
            selected[positions] = True
            assert int(selected.sum()) == num_selected
            end = max(0, seq_len - recent)
            assert selected[:sink].all() and selected[end:].all()
            ranked = torch.zeros_like(selected)
            ranked[sink:end] = True
            score = buffers.scores[row, :seq_len]
            if (ranked & selected).any() and (ranked & ~selected).any():
                assert score[ranked & selected].min() >= score[ranked & ~selected].max()
            assert (indices[row, num_selected:] == UNTOUCHED).all()
