"""One batch shape of ``fasa bench ops``: random inputs, checked results, times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fasa_sglang.flashinfer_ext.baselines import (
    FLASHINFER_TOPK_MAX,
    flashinfer_topk,
    plan_dense,
)
from fasa_sglang.flashinfer_ext.buffers import PlannerBuffers
from fasa_sglang.flashinfer_ext.lane import Lane
from fasa_sglang.flashinfer_ext.planner import SparseIndexPlanner
from fasa_sglang.ops.label_write import KeyPool, write_labels
from fasa_sglang.ops.layer_labels import LayerLabels
from fasa_sglang.ops.token_importance import FORCED, token_importance
from fasa_sglang.workloads.bench.gpu_timing import replay_us
from fasa_sglang.workloads.bench.labels import LABELS
from fasa_sglang.workloads.bench.ops_gate import (
    check_scores,
    check_selection,
    expected_scores,
    output_error,
)

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
HEADS = {"num_qo_heads": NUM_QO_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}
DTYPE = torch.bfloat16
SM_SCALE = HEAD_DIM**-0.5
KV_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * DTYPE.itemsize
SINK, RECENT = 4, 32
WORKSPACE_BYTES = 256 * 2**20
# Requests of a batch whose results are checked.
CHECKED_REQUESTS = 4
# A graph repeats short work more often.
SHORT_TOKENS, SHORT_COPIES, LONG_COPIES = 600_000, 20, 5


@dataclass
class Row:
    """One line of the result. Times in microseconds, bandwidths in TB/s."""

    batch_size: int
    seq_len: int
    budget: int
    labels: str
    combine: str
    dense_us: float
    score_us: float
    select_us: float
    attend_us: float
    layer_us: float
    speedup: float
    dense_tb_per_s: float
    score_tb_per_s: float
    attend_tb_per_s: float
    relative_error: float
    flashinfer_topk_us: float | None


class OpsCase:
    """Random queries, keys and values of one decode layer, with slots in random order.

    Args:
        batch_size: Requests.
        seq_len: Tokens of each request.
        budget: Tokens to select per (request, KV head).
    """

    def __init__(self, batch_size: int, seq_len: int, budget: int) -> None:
        torch.manual_seed(0)
        self.batch_size, self.seq_len, self.budget = batch_size, seq_len, budget
        tokens = batch_size * seq_len
        # Slot 0 belongs to no request.
        slots = torch.randperm(tokens, device="cuda") + 1
        self.slots = slots.int().view(batch_size, seq_len)
        self.q = torch.randn(batch_size, NUM_QO_HEADS, HEAD_DIM, device="cuda").to(DTYPE)
        shape = (tokens + 1, NUM_KV_HEADS, HEAD_DIM)
        self.kv_cache = (
            torch.randn(shape, dtype=DTYPE, device="cuda"),
            torch.randn(shape, dtype=DTYPE, device="cuda"),
        )
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self.copies = SHORT_COPIES if tokens <= SHORT_TOKENS else LONG_COPIES
        self.dense_us = self._time_dense()

    def measure(self, labels: Sequence[str], combines: Sequence[str]) -> list[Row]:
        """Check and time the layer with every kind of labels and every combine rule.

        Raises:
            FasaError: A score, a selection or an output differs from the float32 reference.
        """
        return [self._measure(name, combine) for name in labels for combine in combines]

    def _time_dense(self) -> float:
        wrapper = plan_dense(
            self.batch_size,
            self.seq_len,
            NUM_QO_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            DTYPE,
            self.slots,
            self.workspace,
            SM_SCALE,
        )
        k_pages, v_pages = (cache.unsqueeze(1) for cache in self.kv_cache)
        out = torch.empty_like(self.q)
        return replay_us(lambda: wrapper.run(self.q, (k_pages, v_pages), out=out), self.copies)

    def _labels(self, name: str) -> LayerLabels:
        """Labels of all keys, written by the kernel, with random dims, means and scales."""
        share, label_format = LABELS[name]
        num_fcs = int(HEAD_DIM // 2 * share)
        width = 2 * num_fcs
        order = torch.rand(NUM_KV_HEADS, HEAD_DIM, device="cuda").argsort(dim=-1)
        dims = order[:, :width].int().contiguous()
        mean = torch.randn(NUM_KV_HEADS, width, device="cuda") / 4
        scale = torch.rand(NUM_KV_HEADS, width, device="cuda") + 0.5
        if not label_format.scaled:
            scale = torch.ones_like(scale)
        num_slots = len(self.kv_cache[0])
        cache = label_format.empty_cache(1, num_slots, NUM_KV_HEADS, num_fcs, torch.device("cuda"))
        write_labels(
            KeyPool([self.kv_cache[0]]),
            dims[None],
            mean[None],
            scale[None],
            torch.arange(num_slots, device="cuda"),
            cache,
            label_format,
        )
        return LayerLabels(cache[0], dims, scale, label_format)

    def _measure(self, name: str, combine: str) -> Row:
        labels = self._labels(name)
        buffers = PlannerBuffers(
            max_batch_size=self.batch_size,
            max_kv_len=self.seq_len,
            max_budget=self.budget,
            combine=combine,
            dtype=DTYPE,
            device="cuda",
            **HEADS,
        )
        slots = self.slots.view(-1)
        planner = SparseIndexPlanner(
            self.workspace,
            batch_size=self.batch_size,
            dtype=DTYPE,
            paged_kv_indices_buffer=slots,
            buffers=buffers,
            **HEADS,
        )
        lane = Lane(budget=self.budget, sink=SINK, recent=RECENT)
        planner.plan([lane] * self.batch_size, [self.seq_len] * self.batch_size)
        error = self._check(planner, buffers, labels, combine)

        def ints(value: int) -> torch.Tensor:
            return torch.full((self.batch_size,), value, dtype=torch.int32, device="cuda")

        lens = ints(self.seq_len)
        starts = torch.arange(self.batch_size, dtype=torch.int32, device="cuda") * self.seq_len
        ranges = (slots, starts, lens, ints(SINK), ints(RECENT))
        row_lens = lens.repeat_interleave(NUM_KV_HEADS)
        requests = torch.arange(self.batch_size, dtype=torch.int32, device="cuda")
        row_requests = requests.repeat_interleave(NUM_KV_HEADS)

        def score() -> None:
            token_importance(self.q, labels, *ranges, buffers.scores, sm_scale=SM_SCALE)

        def select() -> None:
            planner.select(self.q, labels, sm_scale=SM_SCALE)

        def attend() -> None:
            planner.attend(self.q, self.kv_cache, sm_scale=SM_SCALE)

        def layer() -> None:
            planner.run(self.q, self.kv_cache, labels, sm_scale=SM_SCALE)

        def topk() -> None:
            scores = buffers.scores.scores
            flashinfer_topk(scores, self.slots, row_lens, row_requests, self.budget)

        score_us, attend_us, layer_us = (
            replay_us(work, self.copies) for work in (score, attend, layer)
        )
        tokens = self.batch_size * self.seq_len
        attended = self.batch_size * min(self.budget, self.seq_len)
        has_topk = self.budget <= FLASHINFER_TOPK_MAX
        return Row(
            self.batch_size,
            self.seq_len,
            self.budget,
            name,
            combine,
            dense_us=self.dense_us,
            score_us=score_us,
            # Selection consumes the scores, so it is timed together with the scoring.
            select_us=replay_us(select, self.copies) - score_us,
            attend_us=attend_us,
            layer_us=layer_us,
            speedup=self.dense_us / layer_us,
            dense_tb_per_s=tokens * KV_BYTES / self.dense_us / 1e6,
            score_tb_per_s=tokens * labels.cache[0].nbytes / score_us / 1e6,
            attend_tb_per_s=attended * KV_BYTES / attend_us / 1e6,
            relative_error=error,
            flashinfer_topk_us=replay_us(topk, self.copies) if has_topk else None,
        )

    def _check(
        self,
        planner: SparseIndexPlanner,
        buffers: PlannerBuffers,
        labels: LayerLabels,
        combine: str,
    ) -> float:
        """Run the layer on poisoned buffers and check some requests; returns the worst error."""
        scores = buffers.scores.scores
        scores.fill_(torch.nan)
        planner.indices.fill_(-(2**20))
        out = planner.run(self.q, self.kv_cache, labels, sm_scale=SM_SCALE)
        count = min(self.budget, self.seq_len)
        worst = 0.0
        for b in range(0, self.batch_size, max(1, self.batch_size // CHECKED_REQUESTS)):
            heads = slice(b * NUM_KV_HEADS, (b + 1) * NUM_KV_HEADS)
            own, q, slots = scores[heads, : self.seq_len], self.q[b], self.slots[b]
            indices = planner.indices[heads, :count]
            expected = expected_scores(q, labels, slots, sm_scale=SM_SCALE, combine=combine)
            check_scores(own, expected, sink=SINK, recent=RECENT, forced=FORCED)
            check_selection(indices, own, slots, NUM_KV_HEADS)
            worst = max(worst, output_error(out[b], q, *self.kv_cache, indices, SM_SCALE))
        return worst
