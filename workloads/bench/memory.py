"""``fasa bench memory``: long replies in the same KV memory, dense and pruned.

The memory is what ``--fits`` requests of full length need without FASA. Every engine runs as many
requests to their end as that memory holds: FASA's labels take their share of it, and a pruned
request never holds more than its prompt, its prune budget and an interval. All requests start
together, and none may be retracted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import FasaError
from fasa_sglang.model_shape import ModelShape
from fasa_sglang.ops.label_format import LABEL_FORMATS
from fasa_sglang.requests import parse_request
from fasa_sglang.workloads.bench.baseline import add_baseline_argument, baseline_label
from fasa_sglang.workloads.bench.dummy_model import (
    SHAPE_NAMES,
    served_model,
    spread_keys,
    write_calibration,
)
from fasa_sglang.workloads.device import device_name
from fasa_sglang.workloads.models.pretrained import load_config
from fasa_sglang.workloads.models.random_weights import config_shape
from fasa_sglang.workloads.serving.engine import running_engine

# Tokens of a reply that reach the client at once, so that sending them costs little.
STREAM_INTERVAL = 64
# Slots that SGLang needs besides those of the requests.
SPARE_SLOTS = 64
# Bytes of a key or value element, bfloat16.
KV_ELEMENT_BYTES = 2
FASA_LABEL = "fasa, pruned"


@dataclass
class Row:
    """One engine.

    Args:
        engine: Label of the baseline, or ``fasa, pruned``.
        pool_tokens: Slots of the KV pool.
        requests: Requests that ran together.
        seconds: Time until the last reply ended.
        tokens_per_s: Output tokens per second of all requests.
        concurrent: Largest number of requests that decoded at the same time.
        pruned_tokens: Tokens that lost their slots, over all requests.
        speedups: ``tokens_per_s`` of this row over that of every baseline, by label.
    """

    engine: str
    pool_tokens: int
    requests: int
    seconds: float
    tokens_per_s: float
    concurrent: int
    pruned_tokens: int
    speedups: dict[str, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--shape", choices=SHAPE_NAMES, default="llama3.1-8b")
    add_baseline_argument(parser)
    parser.add_argument(
        "--fits", type=int, default=8, help="dense requests of full length that the memory holds"
    )
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=16384)
    parser.add_argument("--budget", type=int, default=2048, help="tokens per (request, KV head)")
    parser.add_argument("--prune-budget", type=int, default=4096, help="generated tokens to keep")
    parser.add_argument("--prune-interval", type=int, default=32)
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: The model is not available or cannot be served, or a request was retracted.
    """
    console, log = Console(width=120), Console(stderr=True)
    pool = args.fits * (args.prompt_tokens + args.output_tokens) + SPARE_SLOTS
    rows: list[Row] = []
    backends: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as work:
        model, overrides = served_model(args.shape, Path(work))
        settings = _settings(args, model, Path(work))
        smaller = int(pool / (1 + label_share(config_shape(load_config(model)))))
        pruned_len = args.prompt_tokens + args.prune_budget + args.prune_interval + 1
        more = (smaller - SPARE_SLOTS) // pruned_len
        prune = {"prune": "generated", "prune_budget": args.prune_budget}
        # A server would refuse an invalid request only after the baselines have run.
        parse_request({"fasa": prune}, FasaConfig(**settings), args.prompt_tokens)
        runs = [(name, None, pool, args.fits) for name in args.baseline]
        for baseline, fasa, tokens, count in [*runs, (None, prune, smaller, more)]:
            with running_engine(
                model,
                None if fasa is None else settings,
                baseline=baseline,
                skip_tokenizer_init=True,
                max_total_tokens=tokens,
                max_running_requests=count,
                cuda_graph_bs_decode=sorted({count, *range(1, count, 8)}),
                stream_interval=STREAM_INTERVAL,
                disable_radix_cache=True,
                **overrides,
            ) as engine:
                label = FASA_LABEL
                if baseline is not None:
                    label = baseline_label(baseline, engine.get_server_info())
                    backends[baseline] = label
                log.print(f"{label}: {count} requests in {tokens} tokens")
                spread_keys(engine, args.shape, model)
                rows.append(_measure(engine, label, tokens, count, fasa, args))
                log.print(f"  {rows[-1].tokens_per_s:.0f} tokens/s")
    labels = list(dict.fromkeys(backends.values()))
    for label in labels:
        dense = next(row for row in rows if row.engine == label)
        for row in rows:
            row.speedups[label] = row.tokens_per_s / dense.tokens_per_s
    console.print(_table(args, rows, labels))
    if args.json:
        report = {
            "fasa_sglang": __version__,
            "sglang": version("sglang"),
            "device": device_name(),
            "baselines": backends,
            "settings": {
                key: value for key, value in vars(args).items() if key not in ("json", "baseline")
            },
            "rows": [asdict(row) for row in rows],
        }
        Path(args.json).write_text(json.dumps(report, indent=2, default=str) + "\n")


def _settings(args: argparse.Namespace, model: str, work: Path) -> dict[str, Any]:
    """FASA settings of the server; writes its calibration."""
    calibration = work / "calibration.fasa"
    write_calibration(model, None, calibration)
    return {
        "calibration": str(calibration),
        "budget": args.budget,
        "max_budget": args.budget,
        # Pruning needs sparse steps to judge the tokens, so these must start early enough.
        "min_seq_len": min(FasaConfig.min_seq_len, args.prompt_tokens + args.prune_budget),
        "prune_interval": args.prune_interval,
        "prune_admission": True,
    }


def label_share(shape: ModelShape) -> float:
    """Bytes of a token's labels over those of its keys and values, with the default settings."""
    label_bytes = LABEL_FORMATS[FasaConfig.label_dtype].bytes_per_token(
        len(shape.layers) - FasaConfig.num_dense_layers, shape.num_kv_heads, shape.default_num_fcs
    )
    elements = 2 * shape.num_layers * shape.num_kv_heads * shape.rotation.head_dim
    return label_bytes / (elements * KV_ELEMENT_BYTES)


def _measure(
    engine: Any, label: str, pool: int, count: int, fasa: Any, args: argparse.Namespace
) -> Row:
    rng = random.Random(0)
    prompts = [
        [rng.randrange(1000, 40000) for _ in range(args.prompt_tokens)] for _ in range(count)
    ]
    # The first steps of each kind compile kernels.
    engine.loop.run_until_complete(_send(engine, prompts[0][:64], fasa, 8))

    async def send_all() -> list[tuple[float, float, dict[str, Any]]]:
        sent = (_send(engine, prompt, fasa, args.output_tokens) for prompt in prompts)
        return await asyncio.gather(*sent)

    begin = time.perf_counter()
    replies = engine.loop.run_until_complete(send_all())
    seconds = time.perf_counter() - begin
    metas = [reply["meta_info"] for _, _, reply in replies]
    retracted = sum(meta.get("num_retractions", 0) for meta in metas)
    short = sum(meta["completion_tokens"] < args.output_tokens for meta in metas)
    concurrent = max(
        sum(first <= start <= last for first, last, _ in replies) for start, _, _ in replies
    )
    if retracted or short or concurrent < count:
        raise FasaError(
            f"{label}: {retracted} requests were retracted, {short} ended early and {concurrent} "
            f"ran together, so {count} requests do not fit in {pool} tokens; lower --fits or "
            "--prune-budget"
        )
    return Row(
        engine=label,
        pool_tokens=pool,
        requests=count,
        seconds=seconds,
        tokens_per_s=count * args.output_tokens / seconds,
        concurrent=concurrent,
        pruned_tokens=sum((meta.get("fasa") or {}).get("pruned_tokens", 0) for meta in metas),
    )


async def _send(
    engine: Any, prompt: list[int], fasa: Any, tokens: int
) -> tuple[float, float, dict[str, Any]]:
    """Arrival times of the first and the last piece of a reply, and the reply."""
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    if fasa is not None:
        params["custom_params"] = {"fasa": fasa}
    stream = await engine.async_generate(input_ids=prompt, sampling_params=params, stream=True)
    pieces = [(time.perf_counter(), piece) async for piece in stream]
    return pieces[0][0], pieces[-1][0], pieces[-1][1]


def _table(args: argparse.Namespace, rows: list[Row], baselines: list[str]) -> Table:
    table = Table(
        title=f"{args.shape}, prompts of {args.prompt_tokens}, replies of {args.output_tokens} "
        f"tokens, {device_name()}; x: tokens/s over those of the baseline"
    )
    columns = ("engine", "pool", "requests", "concurrent", "seconds", "tokens/s", "pruned")
    for column in (*columns, *(f"x {label}" for label in baselines)):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.engine,
            str(row.pool_tokens),
            str(row.requests),
            str(row.concurrent),
            f"{row.seconds:.1f}",
            f"{row.tokens_per_s:.0f}",
            str(row.pruned_tokens),
            *(f"{row.speedups[label]:.2f}" for label in baselines),
        )
    return table
