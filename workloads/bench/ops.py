"""``fasa bench ops``: one layer's decode attention, FASA against FlashInfer's dense kernel.

A case is timed only after its result was compared with float32 attention over the same tokens.
Times are medians of CUDA graph replays; small kernels run many times inside one graph, or the
event's own cost would hide them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.plots import plot_speedup

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
DEFAULT_CASES = "1x8192,1x32768,1x131072,16x8192,16x32768,16x131072,64x16384"
# Label dims per KV head and their type.
LABELS = {
    "quarter-fp8": (HEAD_DIM // 4, torch.float8_e4m3fn),
    "three-eighths-fp8": (HEAD_DIM * 3 // 8, torch.float8_e4m3fn),
    "half-fp8": (HEAD_DIM // 2, torch.float8_e4m3fn),
    "quarter-bf16": (HEAD_DIM // 4, torch.bfloat16),
}
TOLERANCE = 0.01
REPEATS = 30


@dataclass
class Row:
    """One line of the result. Times in microseconds, bandwidths in bytes per microsecond."""

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--cases", default=DEFAULT_CASES, help="BATCHxTOKENS,...")
    parser.add_argument("--budget", type=int, default=2048, help="tokens per (request, KV head)")
    parser.add_argument("--labels", default="quarter-fp8", help=f"of {', '.join(LABELS)}, or all")
    parser.add_argument("--combine", default="mean", help="mean, nrm, or all")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up against context as PNG")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: There is no GPU, an argument is off, or a result is wrong.
    """
    if not torch.cuda.is_available():
        raise FasaError("fasa bench ops measures CUDA kernels and found no CUDA GPU; run it on one")
    labels = list(LABELS) if args.labels == "all" else args.labels.split(",")
    combines = ["mean", "nrm"] if args.combine == "all" else args.combine.split(",")
    if not set(labels) <= set(LABELS) or not set(combines) <= {"mean", "nrm"}:
        raise FasaError(
            f"expected --labels of {', '.join(LABELS)} or all and --combine of mean, nrm or all, "
            f"got {args.labels} and {args.combine}"
        )
    console = Console(width=150)
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, flashinfer "
        f"{version('flashinfer-python')}, copy {copy_bandwidth():.2f} TB/s"
    )
    rows: list[Row] = []
    for case in args.cases.split(","):
        batch_size, seq_len = (int(part) for part in case.split("x"))
        rows += measure(batch_size, seq_len, args.budget, labels, combines)
        torch.cuda.empty_cache()
    console.print(_table(rows))
    if args.json:
        report = {
            "fasa_sglang": __version__,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "flashinfer": version("flashinfer-python"),
            "heads": [NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM],
            "rows": [asdict(row) for row in rows],
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        points = [
            (f"batch {row.batch_size}, {row.labels}, {row.combine}", row.seq_len, row.speedup)
            for row in rows
        ]
        plot_speedup(points, "decode attention, times faster than FlashInfer dense", args.plot)


def replay_us(work: Callable[[], object], copies: int) -> float:
    """Median time of ``work`` in microseconds, ``copies`` of it in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            work()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written by a large copy, in TB/s: what this GPU's memory gives today."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / replay_us(lambda: target.copy_(source), 4) / 1e6


def measure(
    batch_size: int, seq_len: int, budget: int, labels: list[str], combines: list[str]
) -> list[Row]:
    """Gate and time one batch shape with every kind of labels and every combine rule.

    Raises:
        FasaError: FASA's output is further than ``TOLERANCE`` from float32 attention.
    """
    from fasa_sglang.flashinfer_ext.attention import FocusedAttention, plan_dense
    from fasa_sglang.flashinfer_ext.topk import FLASHINFER_TOPK_MAX, flashinfer_topk
    from fasa_sglang.ops.label_write import KeyPool, write_labels
    from fasa_sglang.ops.token_importance import ScoreBuffers, token_importance
    from fasa_sglang.ops.token_selection import SelectionBuffers, select_tokens

    torch.manual_seed(0)
    on_gpu = {"device": "cuda"}
    shape = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16)
    num_slots = batch_size * seq_len + 1
    slots = (torch.randperm(num_slots - 1, **on_gpu) + 1).int().view(batch_size, seq_len)
    packed = slots.view(-1)
    starts = torch.arange(batch_size, dtype=torch.int32, **on_gpu) * seq_len
    q = torch.randn(batch_size, NUM_QO_HEADS, HEAD_DIM, **on_gpu).bfloat16()
    k_cache, v_cache = (
        torch.randn(num_slots, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, **on_gpu)
        for _ in range(2)
    )
    lens = torch.full((batch_size,), seq_len, dtype=torch.int32, **on_gpu)
    budgets, sinks, recents = (torch.full_like(lens, n) for n in (budget, 4, 32))
    sm_scale = HEAD_DIM**-0.5
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, **on_gpu)
    out = torch.empty_like(q)
    copies = 20 if batch_size * seq_len <= 600_000 else 5

    heads = shape[:3]
    dense = plan_dense(batch_size, seq_len, *heads, shape[3], slots, workspace, sm_scale)
    paged = (k_cache.unsqueeze(1), v_cache.unsqueeze(1))
    dense_us = replay_us(lambda: dense.run(q, paged, out=out), copies)
    rows, kept = batch_size * NUM_KV_HEADS, min(budget, seq_len)
    indices = torch.zeros(rows, budget, dtype=torch.int32, **on_gpu)
    last_page_len = torch.full((rows,), kept - budget + 1, dtype=torch.int32, **on_gpu)
    attention = FocusedAttention(indices, last_page_len, *heads, shape[3], workspace)
    attention.plan([kept] * rows)
    row_lens = lens.repeat_interleave(NUM_KV_HEADS)
    row_requests = torch.arange(batch_size, dtype=torch.int32, **on_gpu)
    row_requests = row_requests.repeat_interleave(NUM_KV_HEADS)
    kv_bytes = 2 * NUM_KV_HEADS * HEAD_DIM * 2

    def variant(name: str, combine: str) -> Row:
        width, dtype = LABELS[name]
        dims = torch.rand(NUM_KV_HEADS, HEAD_DIM, **on_gpu).argsort(dim=-1)[:, :width].int()
        mean, scale = torch.zeros_like(dims.float()), torch.ones_like(dims.float())
        cache = torch.empty(num_slots, NUM_KV_HEADS, width, dtype=dtype, **on_gpu)
        write_labels(
            KeyPool([k_cache]),
            dims[None],
            mean[None],
            scale[None],
            torch.arange(num_slots, **on_gpu),
            cache[None],
        )
        buffers = ScoreBuffers(batch_size, heads[1], seq_len, combine, "cuda")
        scratch = SelectionBuffers(buffers)
        scoring = (q, cache, dims, scale, packed, starts, lens, sinks, recents, buffers)
        selection = (buffers, packed, starts, lens, budgets, sinks, recents, scratch)

        def score() -> None:
            token_importance(*scoring, sm_scale=sm_scale)

        def score_and_select() -> None:
            score()
            select_tokens(*selection, attention.indices, NUM_KV_HEADS)

        def layer() -> None:
            score_and_select()
            attend()

        def topk() -> None:
            flashinfer_topk(buffers.scores, slots, row_lens, row_requests, budget)

        def attend() -> None:
            attention.run(q, k_cache, v_cache, out, sm_scale)

        error = _gate(layer, attention, buffers, q, k_cache, v_cache, out, slots, sm_scale)
        score_us = replay_us(score, copies)
        attend_us = replay_us(attend, copies)
        layer_us = replay_us(layer, copies)
        tokens = batch_size * seq_len
        return Row(
            batch_size,
            seq_len,
            budget,
            name,
            combine,
            dense_us=dense_us,
            score_us=score_us,
            # The selection resets what the scoring leaves, so it is timed behind it.
            select_us=replay_us(score_and_select, copies) - score_us,
            attend_us=attend_us,
            layer_us=layer_us,
            speedup=dense_us / layer_us,
            dense_tb_per_s=tokens * kv_bytes / dense_us / 1e6,
            score_tb_per_s=tokens * NUM_KV_HEADS * width * dtype.itemsize / score_us / 1e6,
            attend_tb_per_s=batch_size * min(budget, seq_len) * kv_bytes / attend_us / 1e6,
            relative_error=error,
            flashinfer_topk_us=replay_us(topk, copies) if budget <= FLASHINFER_TOPK_MAX else None,
        )

    return [variant(name, combine) for name in labels for combine in combines]


def _gate(
    layer: Callable[[], None],
    attention: Any,
    buffers: Any,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    slots: torch.Tensor,
    sm_scale: float,
) -> float:
    """Run one layer on poisoned buffers and compare some rows with float32.

    Returns:
        The relative error of the worst row looked at.
    """
    buffers.scores.fill_(torch.nan)
    attention.indices.fill_(-(2**20))
    out.fill_(torch.nan)
    layer()
    group, worst = NUM_QO_HEADS // NUM_KV_HEADS, 0.0
    (rows, budget), seq_len = attention.indices.shape, slots.shape[1]
    kept = min(budget, seq_len)
    for row in range(0, rows, max(1, rows // 8)):
        b, h = divmod(row, NUM_KV_HEADS)
        scores = buffers.scores[row, :seq_len]
        index = attention.indices[row, :kept]
        chosen = index // NUM_KV_HEADS
        where = torch.zeros(int(slots.max()) + 1, dtype=torch.int64, device="cuda")
        where[slots[b].long()] = torch.arange(seq_len, device="cuda")
        # Among equal scores any may win, so the scores are compared, not the tokens.
        got = scores[where[chosen.long()]].sort().values
        exact = torch.equal(got, scores.topk(kept).values.sort().values)
        if not exact or len(chosen.unique()) < kept or not (index % NUM_KV_HEADS == h).all():
            raise FasaError(f"row {row} selected other tokens than torch.topk of its scores")
        queries = q[b, h * group : (h + 1) * group].float()
        weights = (queries @ k_cache[chosen, h].float().T * sm_scale).softmax(dim=-1)
        reference = weights @ v_cache[chosen, h].float()
        got = out[b, h * group : (h + 1) * group].float()
        worst = max(worst, float((got - reference).norm() / reference.norm()))
    if not worst < TOLERANCE:
        raise FasaError(f"attention is off by {worst:.2e} of float32, expected under {TOLERANCE}")
    return worst


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"one layer, {NUM_QO_HEADS} query and {NUM_KV_HEADS} KV heads, us")
    columns = "batch,tokens,K,labels,combine,dense (TB/s),score (TB/s),select,FlashInfer top-k"
    columns += ",attend (TB/s),layer,speed-up,error"
    for column in columns.split(","):
        table.add_column(column, justify="right")
    for row in rows:
        topk = row.flashinfer_topk_us
        table.add_row(
            str(row.batch_size),
            str(row.seq_len),
            str(row.budget),
            row.labels,
            row.combine,
            f"{row.dense_us:.1f} ({row.dense_tb_per_s:.2f})",
            f"{row.score_us:.1f} ({row.score_tb_per_s:.2f})",
            f"{row.select_us:.1f}",
            "" if topk is None else f"{topk:.1f}",
            f"{row.attend_us:.1f} ({row.attend_tb_per_s:.2f})",
            f"{row.layer_us:.1f}",
            f"{row.speedup:.2f}",
            f"{row.relative_error:.0e}",
        )
    return table
