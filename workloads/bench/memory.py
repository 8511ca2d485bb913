"""``fasa bench memory``: long replies in the same KV memory, whole and pruned.

Memory is what ``--fits`` requests of full length need on SGLang's own backend. Each backend gets as
many requests as that memory holds to their end: FASA's labels take their share of it, and a pruned
request never holds more than its prompt, its prune budget and an interval. All start at once, and
none may lose its slots on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import ModelShape
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.bench.serve import device_name, served_model, spread_keys
from fasa_sglang.workloads.models.shapes import SHAPES, any_chunks, load_config
from fasa_sglang.workloads.serving.engine import running_engine

# A reply reaches the client in pieces of so many tokens, so that sending them costs little.
STREAM_INTERVAL = 64
# Slots that SGLang wants free beside those of the requests.
SPARE = 64


@dataclass
class Run:
    """One backend."""

    backend: str
    pool_tokens: int
    requests: int
    seconds: float
    tokens_per_s: float
    at_once: int
    """Most requests that decoded at the same time."""
    pruned_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--shape", choices=(*SHAPES, "smollm2"), default="llama3.1-8b")
    parser.add_argument("--fits", type=int, default=8, help="whole requests that memory holds")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=16384)
    parser.add_argument("--budget", type=int, default=2048, help="tokens per (request, KV head)")
    parser.add_argument("--prune-budget", type=int, default=4096)
    parser.add_argument("--prune-interval", type=int, default=32)
    parser.add_argument("--json", metavar="FILE", help="write the runs as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: The model cannot be had or served, or a request lost its slots.
    """
    console, log = Console(width=120), Console(stderr=True)
    whole = args.prompt_tokens + args.output_tokens
    pool = args.fits * whole + SPARE
    with tempfile.TemporaryDirectory() as work:
        model, overrides = served_model(args.shape, Path(work))
        shape = ModelShape.from_config(load_config(model))
        calibration = str(Path(work) / "calibration.safetensors")
        num_fcs = shape.default_num_fcs
        any_chunks(shape, num_fcs).save(calibration)
        settings = {
            "calibration": calibration,
            "budget": args.budget,
            "max_budget": args.budget,
            # Nothing is pruned before a request is long enough to be sparse.
            "min_seq_len": min(FasaConfig.min_seq_len, args.prompt_tokens + args.prune_budget),
            "prune_interval": args.prune_interval,
            "prune_admission": True,
        }
        # Two bytes an element of K and V; labels have one a dim, two dims a chunk.
        label_share = 2 * num_fcs / (4 * load_config(model).head_dim)
        smaller = int(pool / (1 + label_share))
        held = args.prompt_tokens + args.prune_budget + args.prune_interval + 1
        many = (smaller - SPARE) // held
        prune = {"prune": "generated", "prune_budget": args.prune_budget}
        runs = []
        for fasa, tokens, count in ((None, pool, args.fits), (settings, smaller, many)):
            name = "dense" if fasa is None else "fasa, pruned"
            log.print(f"{name}: {count} requests in {tokens} tokens")
            with running_engine(
                model,
                fasa,
                skip_tokenizer_init=True,
                max_total_tokens=tokens,
                max_running_requests=count,
                cuda_graph_bs_decode=sorted({count, *range(1, count, 8)}),
                stream_interval=STREAM_INTERVAL,
                disable_radix_cache=True,
                **overrides,
            ) as engine:
                if args.shape in SHAPES:
                    spread_keys(engine, SHAPES[args.shape])
                asked = False if fasa is None else prune
                runs.append(_measure(engine, name, tokens, count, asked, args))
                log.print(f"  {runs[-1].tokens_per_s:.0f} tokens/s")
    console.print(_table(args, runs))
    if args.json:
        report = {
            "fasa_sglang": __version__,
            "sglang": version("sglang"),
            "device": device_name(),
            "settings": {key: value for key, value in vars(args).items() if key != "json"},
            "runs": [asdict(each) for each in runs],
        }
        Path(args.json).write_text(json.dumps(report, indent=2, default=str) + "\n")


def _measure(
    engine: Any, name: str, pool: int, count: int, fasa: Any, args: argparse.Namespace
) -> Run:
    draw = random.Random(0)
    prompts = [
        [draw.randrange(1000, 40000) for _ in range(args.prompt_tokens)] for _ in range(count)
    ]
    # Compiles what the first step of each kind compiles.
    engine.loop.run_until_complete(_send(engine, prompts[0][:64], fasa, 8))

    async def together() -> list[tuple[float, float, dict[str, Any]]]:
        sent = (_send(engine, prompt, fasa, args.output_tokens) for prompt in prompts)
        return await asyncio.gather(*sent)

    begin = time.perf_counter()
    replies = engine.loop.run_until_complete(together())
    seconds = time.perf_counter() - begin
    metas = [reply["meta_info"] for _, _, reply in replies]
    lost = sum(meta.get("num_retractions", 0) for meta in metas)
    short = [meta["completion_tokens"] for meta in metas if _is_short(meta, args.output_tokens)]
    at_once = max(
        sum(first <= begun <= last for first, last, _ in replies) for begun, _, _ in replies
    )
    if lost or short or at_once < count:
        raise FasaError(
            f"{name}: {lost} requests lost their slots, {len(short)} ended early and {at_once} ran "
            f"at once, so that {count} do not fit in {pool} tokens"
        )
    return Run(
        name,
        pool,
        count,
        seconds,
        count * args.output_tokens / seconds,
        at_once,
        sum((meta.get("fasa") or {}).get("pruned_tokens", 0) for meta in metas),
    )


def _is_short(meta: dict[str, Any], tokens: int) -> bool:
    return bool(meta["completion_tokens"] < tokens)


async def _send(
    engine: Any, prompt: list[int], fasa: Any, tokens: int
) -> tuple[float, float, dict[str, Any]]:
    """When the first and the last piece of a reply came, and the reply."""
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    params["custom_params"] = {"fasa": fasa}
    stream = await engine.async_generate(input_ids=prompt, sampling_params=params, stream=True)
    pieces = [(time.perf_counter(), piece) async for piece in stream]
    return pieces[0][0], pieces[-1][0], pieces[-1][1]


def _table(args: argparse.Namespace, runs: list[Run]) -> Table:
    table = Table(
        title=f"{args.shape}, prompts of {args.prompt_tokens}, replies of {args.output_tokens} "
        f"tokens, {device_name()}"
    )
    for column in ("run", "pool", "requests", "at once", "seconds", "tokens/s", "pruned", "x"):
        table.add_column(column, justify="right")
    for each in runs:
        table.add_row(
            each.backend,
            str(each.pool_tokens),
            str(each.requests),
            str(each.at_once),
            f"{each.seconds:.1f}",
            f"{each.tokens_per_s:.0f}",
            str(each.pruned_tokens),
            f"{each.tokens_per_s / runs[0].tokens_per_s:.2f}",
        )
    return table
