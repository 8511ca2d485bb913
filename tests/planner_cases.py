"""A planner over a small KV pool, and what a decode step of it has to compute.

Every slot that no request owns holds NaN keys, values and labels, and so do the planner's scratch
buffers before a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_cases import DEVICE

from fasa_sglang.flashinfer_ext.buffers import PlannerBuffers
from fasa_sglang.flashinfer_ext.lane import DENSE, Lane
from fasa_sglang.flashinfer_ext.planner import SparseIndexPlanner
from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS
from fasa_sglang.ops.layer_labels import LayerLabels


@dataclass(frozen=True)
class Shape:
    """A model's heads and the settings that kernels are specialised on."""

    num_kv_heads: int
    group: int
    head_dim: int
    width: int
    combine: str = "nrm"
    label_format: str = "fp8"

    def __str__(self) -> str:
        heads = f"HKV{self.num_kv_heads}-G{self.group}-D{self.head_dim}-F{self.width}"
        return f"{heads}-{self.combine}-{self.label_format}"


class PlannerCase:
    """One planner, its KV pool and its labels, all at fixed addresses.

    Args:
        shape: The model.
        batch_size: Lanes, padding included.
        max_kv_len: Tokens of the longest lane.
        max_budget: Columns of the index buffer.
        sinks: Whether the layer has attention sinks.
    """

    def __init__(
        self, shape: Shape, batch_size: int, max_kv_len: int, max_budget: int, sinks: bool = False
    ) -> None:
        self.shape, self.batch_size = shape, batch_size
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        hkv, head_dim = shape.num_kv_heads, shape.head_dim
        self.sm_scale = head_dim**-0.5
        self.num_slots = batch_size * max_kv_len + 50
        pool = (self.num_slots, hkv, head_dim)
        self.k, self.v = (torch.empty(pool, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        num_qo_heads = hkv * shape.group
        self.sink_logits: torch.Tensor | None = None
        if sinks:
            # Around the log-sum-exp of some thousand tokens.
            noise = torch.randn(num_qo_heads, generator=self.generator, device=DEVICE)
            self.sink_logits = (8.0 + 2 * noise).bfloat16()
        self.q = torch.empty(
            batch_size, num_qo_heads, head_dim, dtype=torch.bfloat16, device=DEVICE
        )
        label_format = LABEL_FORMATS[shape.label_format]
        dims = torch.rand(hkv, head_dim, generator=self.generator, device=DEVICE).argsort(dim=-1)
        self.mean = torch.randn(hkv, shape.width, generator=self.generator, device=DEVICE)
        scale = torch.ones(hkv, shape.width, device=DEVICE)
        if label_format.scaled:
            scale += torch.rand(hkv, shape.width, generator=self.generator, device=DEVICE)
        cache = torch.zeros(
            self.num_slots, hkv, shape.width, dtype=label_format.dtype, device=DEVICE
        )
        self.labels = LayerLabels(
            cache, dims[:, : shape.width].int().contiguous(), scale, label_format
        )
        self.selection_counts = torch.zeros(self.num_slots, dtype=torch.int32, device=DEVICE)
        heads = {"num_qo_heads": num_qo_heads, "num_kv_heads": hkv, "head_dim": head_dim}
        self.buffers = PlannerBuffers(
            # Scratch of a larger batch than the planner's.
            max_batch_size=batch_size + 1,
            max_kv_len=max_kv_len,
            max_budget=max_budget,
            combine=shape.combine,
            dtype=torch.bfloat16,
            device=DEVICE,
            **heads,
        )
        self.slots = torch.zeros(batch_size * max_kv_len, dtype=torch.int32, device=DEVICE)
        self.planner = SparseIndexPlanner(
            torch.empty(128 * 2**20, dtype=torch.uint8, device=DEVICE),
            batch_size=batch_size,
            dtype=torch.bfloat16,
            paged_kv_indices_buffer=self.slots,
            buffers=self.buffers,
            **heads,
        )

    def run(self) -> torch.Tensor:
        return self.planner.run(
            self.q,
            (self.k, self.v),
            self.labels,
            sm_scale=self.sm_scale,
            selection_counts=self.selection_counts,
            sink_logits=self.sink_logits,
        )

    def run_dense(self) -> torch.Tensor:
        return self.planner.run_dense(
            self.q, (self.k, self.v), sm_scale=self.sm_scale, sink_logits=self.sink_logits
        )

    def start(self, lanes: list[Lane], kv_lens: list[int], mixed: bool | None = None) -> None:
        """New queries, keys, values and slots for a step; plan it and poison everything else."""
        like = {"generator": self.generator, "device": DEVICE}
        self.lanes = [*lanes, *[DENSE] * (self.batch_size - len(lanes))]
        permuted = (torch.randperm(self.num_slots - 1, **like) + 1).int()
        self.slots.zero_()
        self.slots[: sum(kv_lens)] = permuted[: sum(kv_lens)]
        self.live: list[torch.Tensor] = []
        for lane, part in zip(self.lanes, self.slots[: sum(kv_lens)].split(kv_lens), strict=True):
            # Any tokens but those of the prefix and the current one.
            prunable = len(part) - 1 - lane.dense_prefix
            pruned = torch.randperm(max(prunable, 0), **like)[: lane.pruned]
            part[lane.dense_prefix + pruned] = 0
            self.live.append(part[part != 0].long())
        owned = torch.cat(self.live)
        for cache in (self.k, self.v):
            cache.fill_(torch.nan)
            # Indices that were never written point to slot 0. It is not NaN, but would show.
            cache[0] = 1000.0
            cache[owned] = torch.randn(len(owned), *cache.shape[1:], **like).bfloat16()
        self.q.copy_(torch.randn(self.q.shape, **like))
        label_format = self.labels.label_format
        packed = label_format.pack(self.k, self.labels.dims.long(), self.mean, self.labels.scale)
        packed.view(torch.uint8)[0] = 0
        self.labels.cache.view(torch.uint8).copy_(packed.view(torch.uint8))
        self.selection_counts.zero_()
        self.buffers.scores.scores.fill_(torch.nan)
        self.buffers.out.fill_(torch.nan)
        self.buffers.lse.fill_(torch.nan)
        self.planner.plan(lanes, kv_lens, mixed=mixed)

    def check(self, out: torch.Tensor) -> None:
        """Compare a step's output, indices and counts with the reference."""
        counts = torch.zeros_like(self.selection_counts)
        for b in range(self.batch_size):
            self._check_lane(b, out[b : b + 1].float(), counts)
        assert torch.equal(self.selection_counts, counts)

    def check_dense(self, out: torch.Tensor) -> None:
        """Compare the output of a dense layer with attention over every live token."""
        for b, live in enumerate(self.live):
            everything = torch.arange(len(live), device=DEVICE)
            positions = everything.expand(1, self.shape.num_kv_heads, -1)
            expected = self._attend(self.q[b : b + 1], live, positions)
            assert relative_error(out[b : b + 1].float(), expected) < 0.01, b

    def _check_lane(self, b: int, out: torch.Tensor, counts: torch.Tensor) -> None:
        lane, live, hkv = self.lanes[b], self.live[b], self.shape.num_kv_heads
        q = self.q[b : b + 1]
        everything = torch.arange(len(live), device=DEVICE).expand(1, hkv, -1)
        dense = self._attend(q, live, everything)
        if lane.budget is None:
            assert relative_error(out, dense) < 0.01, (b, relative_error(out, dense))
            return
        prefix = lane.dense_prefix
        free = live[prefix:]
        lens = torch.tensor([len(free)], device=DEVICE)
        # The anchors of ``nrm`` are among the tokens behind the prefix.
        scores = reference.token_importance(
            q, self.labels, free[None], lens, sm_scale=self.sm_scale, combine=self.shape.combine
        )
        best, _ = reference.select_tokens(
            scores,
            lens,
            budget=lane.budget,
            sink=0 if prefix else lane.sink,
            recent=lane.recent,
        )
        num_selected = min(lane.budget, len(free))
        rows = self.planner.indices[b * hkv : (b + 1) * hkv, :num_selected].long()
        assert (rows % hkv == torch.arange(hkv, device=DEVICE)[:, None]).all()
        position = torch.full((self.num_slots,), -1, device=DEVICE)
        position[free] = torch.arange(len(free), device=DEVICE)
        own = position[rows // hkv].sort(dim=-1).values
        assert (own >= 0).all() and (own.diff(dim=-1) > 0).all()
        if lane.counts_from is not None:
            slots = (rows // hkv).flatten()
            counts.index_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))
        # Scores are rounded to float16, so tokens at the edge of the budget may swap.
        common = [len(set(own[h].tolist()) & set(best[0, h].tolist())) for h in range(hkv)]
        allowed = 1 + num_selected // 50 if num_selected < len(free) else 0
        assert min(common) >= num_selected - allowed, (b, num_selected, common)
        # The output is exact for the tokens that were selected ...
        attended = torch.cat([everything[..., :prefix], prefix + own[None]], dim=-1)
        assert relative_error(out, self._attend(q, live, attended)) < 0.01, b
        # ... and that of the reference where both selected the same; a token that swapped may carry
        # any weight. The reference is far from dense where few are selected.
        expected = self._attend(
            q, live, torch.cat([everything[..., :prefix], prefix + best], dim=-1)
        )
        if not prefix and self.sink_logits is None:
            decoded = reference.fasa_decode(
                q,
                self.k,
                self.v,
                self.labels,
                live[None],
                lens,
                budget=lane.budget,
                sink=lane.sink,
                recent=lane.recent,
                sm_scale=self.sm_scale,
                combine=self.shape.combine,
            )
            torch.testing.assert_close(decoded, expected)
            if num_selected < len(free) // 4:
                assert relative_error(dense, expected) > 0.5, b
        if min(common) == num_selected:
            assert relative_error(out, expected) < 0.01, (b, relative_error(out, expected))

    def _attend(self, q: torch.Tensor, live: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return reference.focused_attention(
            q,
            self.k,
            self.v,
            live[None],
            positions,
            sm_scale=self.sm_scale,
            sink_logits=self.sink_logits,
        )


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN if ``got`` has any; comparisons with it are False."""
    return float((got - expected).norm() / expected.norm())
