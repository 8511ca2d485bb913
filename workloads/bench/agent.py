"""``fasa bench agent``: an agent loop over the OpenAI API, without FASA and with it.

Without ``--base-url`` this command starts the servers itself: one per baseline, and one with FASA.
On the FASA server the loop runs with and without ``fasa`` in its requests. With ``--base-url``
there is only that server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.agent_loop import Answer, run_agents
from fasa_sglang.workloads.bench.baseline import baseline_label, parse_baselines
from fasa_sglang.workloads.models.packaged import MODEL_HELP, find_model
from fasa_sglang.workloads.models.pretrained import load_tokenizer
from fasa_sglang.workloads.serving.engine import AUTO
from fasa_sglang.workloads.serving.server import (
    flush_prefix_cache,
    given_or_running_server,
    running_baseline,
)
from fasa_sglang.workloads.serving.server_info import server_info

# Tokens of a turn, to size the KV pool of a CPU server.
CPU_TURN_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--base-url", metavar="URL", help="address of a running server with FASA")
    parser.add_argument("--model", default="smollm2", help=MODEL_HELP)
    parser.add_argument(
        "--baseline",
        type=parse_baselines,
        metavar="NAME,...",
        help="attention backends to compare with; default: auto, which SGLang chooses by itself",
    )
    parser.add_argument("--branches", type=int, default=4, help="agents that run concurrently")
    parser.add_argument("--turns", type=int, default=3, help="questions per agent")
    parser.add_argument(
        "--prefix-tokens", type=int, default=4096, help="minimum length of the system prompt"
    )
    parser.add_argument(
        "--tokenize",
        choices=("server", "client"),
        default="server",
        help="who tokenises prompts; with client, tokenising does not delay other replies",
    )
    parser.add_argument(
        "--fasa", type=json.loads, default=True, metavar="JSON", help="the fasa request parameter"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write every answer as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: A server is not available or does not run FASA, or an option does not apply.
    """
    if args.base_url and args.baseline:
        raise FasaError(
            "--baseline does not apply to the running server of --base-url; leave one of them out"
        )
    model = find_model(args.model)
    tokenizer = load_tokenizer(model) if args.tokenize == "client" else None
    flags = ["--enable-cache-report"]
    if not torch.cuda.is_available():
        # The default pool would take a third of the machine's memory.
        tokens = args.branches * (args.prefix_tokens + args.turns * CPU_TURN_TOKENS)
        flags += ["--max-total-tokens", str(2 * tokens)]
    results: dict[str, Any] = {}
    if not args.base_url:
        for baseline in args.baseline or [AUTO]:
            with running_baseline(model, baseline, *flags) as url:
                label = baseline_label(baseline, server_info(url))
                results |= _measure(args, url, tokenizer, {label: None})
    settings = json.dumps({"min_seq_len": min(2048, args.prefix_tokens)})
    flags += ["--settings", settings]
    with given_or_running_server(args.base_url, model, *flags) as url:
        results |= _measure(args, url, tokenizer, {"fasa off": False, "fasa on": args.fasa})
        if results["fasa on"]["kv_read_ratio"] is None:
            raise FasaError(f"{url} does not report FASA; start it with: fasa serve MODEL")
    Console(width=140).print(_table(args, results))
    if args.json:
        names = ("branches", "turns", "prefix_tokens", "fasa", "seed", "tokenize")
        report = {
            "fasa_sglang": __version__,
            "settings": {name: getattr(args, name) for name in names},
            "runs": results,
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def _measure(
    args: argparse.Namespace, url: str, tokenizer: Any, parameters: dict[str, Any]
) -> dict[str, Any]:
    """Run the loop on one server with each of ``parameters`` as ``fasa``; summaries by name."""
    common = {"prefix_tokens": args.prefix_tokens, "tokenizer": tokenizer}
    # A server's first requests compile kernels.
    for fasa in parameters.values():
        asyncio.run(run_agents(url, branches=1, turns=1, seed=args.seed + 1, fasa=fasa, **common))
    results = {}
    for name, fasa in parameters.items():
        flush_prefix_cache(url)
        size = {"branches": args.branches, "turns": args.turns, "seed": args.seed}
        start = time.perf_counter()
        answers = asyncio.run(run_agents(url, fasa=fasa, **size, **common))
        results[name] = summary(answers, time.perf_counter() - start)
        results[name]["answers"] = [asdict(answer) for answer in answers]
    return results


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """The figures of a run; None where the server did not report them.

    Args:
        answers: Answers of all branches.
        seconds: Duration of the run.
    """
    turns = len({(answer.branch, answer.turn) for answer in answers})
    cached = _reported(answers, lambda answer: answer.cached_tokens)
    tpots = _reported(answers, lambda answer: answer.tpot_s)
    ratios = _reported(answers, lambda answer: answer.kv_read_ratio)

    def correct(kind: str) -> float:
        return statistics.mean(answer.correct for answer in answers if answer.kind == kind)

    return {
        "turns_per_s": turns / seconds,
        "ttft_ms": statistics.median(answer.ttft_s for answer in answers) * 1e3,
        "tpot_ms": statistics.median(tpots) * 1e3 if tpots else None,
        "reply_ms": statistics.median(answer.reply_s for answer in answers) * 1e3,
        "cache_hit": sum(cached) / sum(answer.prompt_tokens for answer in answers)
        if cached
        else None,
        "prompt_tokens": max(answer.prompt_tokens for answer in answers),
        "calls_right": correct("call"),
        "answers_right": correct("answer"),
        "kv_read_ratio": statistics.mean(ratios) if ratios else None,
    }


def _reported(answers: Sequence[Answer], figure: Callable[[Answer], float | None]) -> list[float]:
    values = (figure(answer) for answer in answers)
    return [value for value in values if value is not None]


def _table(args: argparse.Namespace, results: dict[str, Any]) -> Table:
    longest = max(row["prompt_tokens"] for row in results.values())
    table = Table(
        title=f"{args.branches} branches, {args.turns} turns each, prompts of up to {longest} "
        "tokens"
    )
    formats = {
        "turns/s": ("turns_per_s", ".2f"),
        "TTFT ms": ("ttft_ms", ".0f"),
        "TPOT ms": ("tpot_ms", ".2f"),
        "reply ms": ("reply_ms", ".0f"),
        "cache hit": ("cache_hit", ".1%"),
        "calls right": ("calls_right", ".0%"),
        "answers right": ("answers_right", ".0%"),
        "KV read": ("kv_read_ratio", ".3f"),
    }
    for column in ("run", *formats):
        table.add_column(column, justify="right")
    for name, row in results.items():
        cells = ((row[key], form) for key, form in formats.values())
        table.add_row(
            name, *("" if value is None else format(value, form) for value, form in cells)
        )
    return table
