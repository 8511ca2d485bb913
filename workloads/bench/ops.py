"""``fasa bench ops``: one layer's decode attention with FASA against FlashInfer's dense kernel.

A case is timed only after its scores were compared with the float32 reference, its selection with
``torch.topk``, and its output with float32 attention over the same tokens. Times are medians of
CUDA graph replays; short kernels are repeated inside one graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import FasaError
from fasa_sglang.ops.reference import COMBINE_RULES
from fasa_sglang.workloads.bench.gpu_timing import copy_bandwidth
from fasa_sglang.workloads.bench.labels import DEFAULT_LABELS, LABELS
from fasa_sglang.workloads.bench.serve import parse_cases
from fasa_sglang.workloads.plots import plot_speedup

if TYPE_CHECKING:
    from fasa_sglang.workloads.bench.ops_case import Row

DEFAULT_CASES = "1x8192,1x32768,1x131072,16x8192,16x32768,16x131072,64x16384"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--cases", default=DEFAULT_CASES, help="BATCHxTOKENS,...")
    parser.add_argument("--budget", type=int, default=2048, help="tokens per (request, KV head)")
    parser.add_argument("--labels", default=DEFAULT_LABELS, help=f"of {', '.join(LABELS)}, or all")
    parser.add_argument(
        "--combine", default=FasaConfig.combine, help=f"of {', '.join(COMBINE_RULES)}, or all"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up against context as PNG")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: There is no GPU, an argument is invalid, or a result is wrong.
    """
    cases = parse_cases(args.cases)
    labels = parse_choices("--labels", args.labels, tuple(LABELS))
    combines = parse_choices("--combine", args.combine, COMBINE_RULES)
    if not torch.cuda.is_available():
        raise FasaError("fasa bench ops measures CUDA kernels and found no CUDA GPU; run it on one")
    # Only this command needs FlashInfer.
    from fasa_sglang.workloads.bench.ops_case import HEAD_DIM, NUM_KV_HEADS, NUM_QO_HEADS, OpsCase

    heads = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM)
    console = Console(width=150)
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, flashinfer "
        f"{version('flashinfer-python')}, copy {copy_bandwidth():.2f} TB/s"
    )
    rows: list[Row] = []
    for batch_size, seq_len in cases:
        rows += OpsCase(batch_size, seq_len, args.budget).measure(labels, combines)
        torch.cuda.empty_cache()
    title = f"one layer, {NUM_QO_HEADS} query and {NUM_KV_HEADS} KV heads"
    console.print(_table(rows, f"{title}, us"))
    if args.json:
        report = {
            "fasa_sglang": __version__,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "flashinfer": version("flashinfer-python"),
            "heads": heads,
            "rows": [asdict(row) for row in rows],
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        points = [
            (f"batch {row.batch_size}, {row.labels}, {row.combine}", row.seq_len, row.speedup)
            for row in rows
        ]
        plot_speedup(
            points,
            title=f"Decode attention, {title}, budget {args.budget}",
            label="speed-up over FlashInfer's dense decode",
            path=args.plot,
        )


def parse_choices(option: str, text: str, choices: Sequence[str]) -> list[str]:
    """Parse a comma-separated list of choices, or ``all``.

    Raises:
        FasaError: One of them is unknown.
    """
    names = list(choices) if text == "all" else text.split(",")
    if not set(names) <= set(choices):
        raise FasaError(f"{option} must be of {', '.join(choices)}, or all, got {text!r}")
    return names


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title)
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
