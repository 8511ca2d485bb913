"""``fasa bench serve``: the same requests to SGLang without FASA and with it.

All engines run in this command, one after another, with the same settings. On the FASA engine the
requests run with and without ``fasa``: the latter shows what FASA costs requests that do not use
it. TTFT is the time to the first token of cold prompts. For TPOT all prompts are in the prefix
cache, so that the whole batch decodes together: the time of ``N`` tokens minus that of one token,
over ``N - 1``.

SGLang's own client (``sglang.benchmark``) cannot send ``custom_params`` and needs a tokenizer, so
this command sends the requests itself; it measures the same quantities.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import FasaError
from fasa_sglang.names import BACKEND_NAME
from fasa_sglang.ops.reference import COMBINE_RULES
from fasa_sglang.workloads.bench.baseline import add_baseline_argument, baseline_label
from fasa_sglang.workloads.bench.dummy_model import (
    SHAPE_NAMES,
    served_model,
    spread_keys,
    write_calibration,
)
from fasa_sglang.workloads.bench.labels import LABELS
from fasa_sglang.workloads.bench.serve_timing import Row, add_speedups, time_engine
from fasa_sglang.workloads.device import device_name
from fasa_sglang.workloads.eval.settings import json_object
from fasa_sglang.workloads.plots import plot_speedup
from fasa_sglang.workloads.serving.engine import running_engine

DEFAULT = "default"
DEFAULT_CASES = {
    "llama3.1-8b": "1x1024,8x1024,1x32768,32x8192,8x32768,12x32768,1x131072",
    "qwen3-8b": "1x1024,8x1024,1x32768,32x8192,8x32768",
    "gpt-oss-20b": "1x32768,8x32768,1x131072",
    "qwen3-next-16-layers": "1x32768,8x32768,1x131072",
    "minimax-m2-10-layers": "1x32768,8x32768,1x131072",
    "smollm2": "1x1024,1x8064,8x8064",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--shape", choices=SHAPE_NAMES, default="llama3.1-8b")
    parser.add_argument("--cases", help="BATCHxTOKENS,...; tokens of prompt and reply together")
    add_baseline_argument(parser)
    parser.add_argument("--budget", type=int, default=2048, help="tokens per (request, KV head)")
    parser.add_argument(
        "--labels",
        choices=(DEFAULT, *LABELS),
        default=DEFAULT,
        help="share of the chunks and format; default: what a server without settings uses",
    )
    parser.add_argument("--combine", choices=COMBINE_RULES, default=FasaConfig.combine)
    parser.add_argument(
        "--request",
        type=json_object,
        default={},
        metavar="JSON",
        help="extra fasa request keys, as JSON",
    )
    parser.add_argument("--output-tokens", type=int, default=128, help="tokens timed per request")
    parser.add_argument(
        "--engine",
        type=json_object,
        default={},
        metavar="JSON",
        help="further arguments of sglang.Engine for all engines, as JSON",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up against context as PNG")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: An argument is invalid, or the model is not available or cannot be served.
    """
    console, log = Console(width=150), Console(stderr=True)
    cases = parse_cases(args.cases or DEFAULT_CASES[args.shape])
    with tempfile.TemporaryDirectory() as work:
        model, overrides = served_model(args.shape, Path(work))
        settings = _settings(args, model, Path(work))
        overrides |= {
            "skip_tokenizer_init": True,
            "max_running_requests": max(batch for batch, _ in cases),
            "cuda_graph_bs_decode": sorted({batch for batch, _ in cases}),
            **args.engine,
        }
        if not torch.cuda.is_available():
            # The default pool would take a third of the machine's memory.
            overrides["max_total_tokens"] = 2 * max(batch * tokens for batch, tokens in cases)
        rows: list[Row] = []
        backends: dict[str, str] = {}
        for baseline in args.baseline:
            log.print(f"starting SGLang without FASA, attention backend {baseline}")
            with running_engine(model, None, baseline=baseline, **overrides) as engine:
                backends[baseline] = label = baseline_label(baseline, engine.get_server_info())
                spread_keys(engine, args.shape, model)
                rows += time_engine(engine, label, cases, [None], args.output_tokens, log)
        log.print("starting SGLang with FASA")
        with running_engine(model, settings, **overrides) as engine:
            spread_keys(engine, args.shape, model)
            requests = [False, {"budget": args.budget, **args.request}]
            rows += time_engine(engine, BACKEND_NAME, cases, requests, args.output_tokens, log)
    labels = list(dict.fromkeys(backends.values()))
    add_speedups(rows, labels)
    rows.sort(key=lambda row: row.case)
    console.print(
        f"{args.shape}, budget {args.budget}, labels {args.labels}, combine {args.combine}, "
        f"{device_name()}, sglang {version('sglang')}"
    )
    console.print(serve_table(rows, labels))
    if args.json:
        report = {
            "fasa_sglang": __version__,
            "sglang": version("sglang"),
            "torch": torch.__version__,
            "device": device_name(),
            "shape": args.shape,
            "baselines": backends,
            "settings": {**settings, "calibration": args.labels},
            "request": args.request,
            "engine": args.engine,
            "rows": [asdict(row) for row in rows],
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot_speedup(
            [
                (f"batch {row.batch_size}, over {label}", row.context_len, row.speedups[label])
                for row in rows
                for label in labels
                if row.fasa
            ],
            title=f"Decoding with FASA, {args.shape}, budget {args.budget}, {device_name()}",
            label=f"speed-up per token over {', '.join(labels)}",
            path=args.plot,
        )


def parse_cases(text: str) -> list[tuple[int, int]]:
    """Parse ``BATCHxTOKENS,...``.

    Raises:
        FasaError: A case does not have this form.
    """
    try:
        return [
            (int(batch), int(tokens))
            for batch, tokens in (case.split("x") for case in text.split(","))
        ]
    except ValueError as error:
        raise FasaError(f"--cases must be BATCHxTOKENS,..., got {text!r}") from error


def _settings(args: argparse.Namespace, model: str, work: Path) -> dict[str, Any]:
    """FASA settings of the server; writes its calibration."""
    share, label_dtype = None, FasaConfig.label_dtype
    if args.labels != DEFAULT:
        share, label_dtype = LABELS[args.labels][0], LABELS[args.labels][1].name
    calibration = work / "calibration.fasa"
    write_calibration(model, share, calibration)
    return {
        "calibration": str(calibration),
        "budget": args.budget,
        "max_budget": args.budget,
        "label_dtype": label_dtype,
        "combine": args.combine,
    }


def serve_table(rows: list[Row], baselines: list[str]) -> Table:
    """The rows as a table with one speed-up column per baseline."""
    table = Table(title="medians; x: time per token of the baseline over that of the row")
    columns = ("batch", "tokens", "engine", "TTFT ms", "TPOT ms", "tokens/s", "KV read")
    for column in (*columns, *(f"x {label}" for label in baselines)):
        table.add_column(column, justify="right")
    for row in rows:
        is_baseline = row.engine in baselines
        table.add_row(
            str(row.batch_size),
            str(row.context_len),
            row.engine if is_baseline else f"{row.engine} {'on' if row.fasa else 'off'}",
            f"{row.ttft_ms:.0f}",
            f"{row.tpot_ms:.2f}",
            f"{row.tokens_per_s:.0f}",
            "" if row.kv_read_ratio is None else f"{row.kv_read_ratio:.3f}",
            *(f"{row.speedups[label]:.2f}" for label in baselines),
        )
    return table
