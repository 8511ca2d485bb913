"""``fasa eval``: what sparse decoding does to a model's answers, beside dense and null baselines.

Every sample is decoded densely and with every selector at every budget, by the server that serves
the model, and compared pair by pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.calibration import corpus
from fasa_sglang.calibration_cache import model_fingerprint
from fasa_sglang.calibration_file import FORMAT
from fasa_sglang.errors import FasaError
from fasa_sglang.selectors import SELECTORS
from fasa_sglang.workloads.eval.pooled import pool, pool_tables
from fasa_sglang.workloads.eval.results import (
    SUMMARY,
    Results,
    compare,
    folder_name,
    summarise,
    summary_table,
)
from fasa_sglang.workloads.eval.settings import (
    DENSE,
    Setting,
    json_object,
    needs_choosing,
    parse_settings,
)
from fasa_sglang.workloads.eval.tasks import find_task
from fasa_sglang.workloads.eval.tasks.base import Options, Session, Task
from fasa_sglang.workloads.models.packaged import MODEL_HELP, find_model
from fasa_sglang.workloads.models.shapes import load_config, load_tokenizer
from fasa_sglang.workloads.plots import plot_budgets, plot_depths
from fasa_sglang.workloads.serving.client import server_info
from fasa_sglang.workloads.serving.server import running_server, server_url

COMPARE, POOL = "compare", "pool"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "tasks",
        nargs="+",
        metavar="TASK",
        help="perplexity, agreement, needle, write-once, cloze, agent, or a task of sgl-eval or "
        "lm-eval; or: compare FOLDER FOLDER; or: pool FOLDER...",
    )
    parser.add_argument("--model", default="smollm2", help=MODEL_HELP)
    parser.add_argument("--base-url", metavar="URL", help="of a server that runs, with FASA")
    parser.add_argument("--selectors", default="fasa", help=f"of {','.join(SELECTORS)}")
    parser.add_argument("--budgets", default="128,256,512,1024,2048", help="tokens per KV head")
    parser.add_argument("--limit", type=int, default=100, help="most samples or problems of a task")
    parser.add_argument("--samples", type=int, default=1, help="replies per problem of sgl-eval's")
    parser.add_argument("--length", type=int, default=4096, help="tokens of prompts that are made")
    parser.add_argument("--max-tokens", type=int, help="of a reply; default: the task's own")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="of sgl-eval's tasks, and of agreement's continuations",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="of agreement's continuations",
    )
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="agreement's continuations go on where the model would end them",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text", metavar="FILE", help="text of made prompts; default: Python's own"
    )
    parser.add_argument("--calibration", metavar="FILE", help="default: made once and kept")
    parser.add_argument("--settings", type=json_object, default={}, metavar="JSON", help="server's")
    parser.add_argument(
        "--request", type=json_object, default={}, metavar="JSON", help="request keys"
    )
    parser.add_argument("--concurrency", type=int, help="requests at once; default: 16, on a CPU 1")
    parser.add_argument("--out", metavar="FOLDER", default="results", help="results go below it")
    parser.add_argument(
        "--min-dense", type=float, default=0.0, help="pool only tasks of which dense gets as much"
    )
    parser.add_argument("--flags", default="", help="further flags of SGLang, in one string")


@dataclass
class Job:
    """One task with its results folder."""

    task: Task
    results: Results
    rows_per_setting: int


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: A task, a dataset, a setting or the server cannot be had, or rows differ in their
            conditions.
    """
    console = Console(width=160)
    if args.tasks[0] == COMPARE:
        _compare(args.tasks[1:], console)
        return
    if args.tasks[0] == POOL:
        _pool(args.tasks[1:], args, console)
        return
    settings = parse_settings(args.selectors, args.budgets)
    tasks = [find_task(name) for name in args.tasks]
    model = find_model(args.model)
    tokenizer = load_tokenizer(model)
    text = corpus.text_file(args.text) if args.text else corpus.default_text()
    options = Options(
        args.limit,
        args.samples,
        args.length,
        args.max_tokens,
        args.seed,
        args.temperature,
        args.repetition_penalty,
        args.ignore_eos,
        text,
    )
    jobs = [_job(task, model, tokenizer, options, args) for task in tasks]
    try:
        _decode(jobs, settings, model, tokenizer, options, args)
    except KeyboardInterrupt:
        raise FasaError("interrupted; all samples that came back are kept, run it again") from None
    finally:
        for job in jobs:
            job.results.close()
            if job.results.rows:
                _report(job, console)


def _job(task: Task, model: str, tokenizer: Any, options: Options, args: Any) -> Job:
    conditions = {
        "task": task.name,
        "model": f"{Path(model).name} {model_fingerprint(model)}",
        "limit": options.limit,
        **task.conditions(options),
        "server": args.settings,
        "request": args.request,
        # Of a kept one the model is said above, and the format says what the defaults were.
        "calibration": _sha256(args.calibration) or f"kept, format {FORMAT}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "fasa_sglang": __version__,
        "sglang": version("sglang"),
    }
    results = Results(Path(args.out) / folder_name(task.name, model, conditions), conditions)
    return Job(task, results, task.prepare(tokenizer, options))


def _sha256(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise FasaError(f"cannot read the calibration {path} ({error.strerror})") from error


def _decode(
    jobs: list[Job],
    settings: list[Setting],
    model: str,
    tokenizer: Any,
    options: Options,
    args: argparse.Namespace,
) -> None:
    on_gpu = torch.cuda.is_available()
    concurrency = args.concurrency or (16 if on_gpu else 1)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # As it is now: a harness may have it redirected while it runs.
        console=Console(file=sys.stderr),
    )
    total = sum(job.rows_per_setting for job in jobs) * len(settings)
    names = {setting.name for setting in settings}
    done = sum(row.setting in names for job in jobs for row in job.results.rows)
    with progress:
        bar = progress.add_task("starting the server", total=total, completed=done)
        if all(_complete(job, settings) for job in jobs):
            return
        with _server(model, settings, concurrency, args) as url:
            context_len = _context_len(model, url)
            asked = partial(_asked, args.seed, args.request, needs_choosing(settings))
            for job in jobs:
                session = Session(
                    url,
                    job.results,
                    tokenizer,
                    context_len,
                    concurrency,
                    options,
                    asked,
                    lambda: progress.advance(bar),
                )
                progress.update(bar, description=job.task.name)
                job.task.evaluate(settings, session)


def _asked(seed: int, more: dict[str, Any], choosing: bool, setting: Setting) -> Any:
    return setting.fasa(seed, more, choosing)


def _complete(job: Job, settings: list[Setting]) -> bool:
    names = [row.setting for row in job.results.rows]
    return all(names.count(setting.name) >= job.rows_per_setting for setting in settings)


@contextmanager
def _server(
    model: str, settings: list[Setting], concurrency: int, args: argparse.Namespace
) -> Iterator[str]:
    """The address of the server given, or of one that runs for the time of the block."""
    if args.base_url:
        yield server_url(args.base_url)
        return
    budgets = [setting.budget for setting in settings if setting.budget is not None]
    fasa: dict[str, Any] = {"min_seq_len": 0, "max_budget": max(4096, *budgets, 0)}
    if needs_choosing(settings):
        fasa["selector"] = "any"
    flags = ["--settings", json.dumps({**fasa, **args.settings})]
    flags += ["--enable-custom-logit-processor", "--max-running-requests", str(concurrency)]
    if needs_choosing(settings) and torch.cuda.is_available():
        for phase in ("decode", "prefill"):
            flags += [f"--cuda-graph-backend-{phase}", "disabled"]
    if args.calibration:
        flags += ["--calibration", args.calibration]
    with running_server(model, *flags, *args.flags.split()) as url:
        yield url


def _context_len(model: str, url: str) -> int:
    """Most tokens of a request that model and server hold."""
    longest = load_config(model).get_text_config().max_position_embeddings
    return min(longest, server_info(url).get("max_total_num_tokens") or longest)


def _report(job: Job, console: Console) -> None:
    """Print, draw and write what the rows add up to."""
    results, metrics = job.results, job.task.metrics
    entries = summarise(results.rows, metrics)
    console.print(summary_table(f"{job.task.name}: {results.folder}", entries, metrics))
    report = {"conditions": results.conditions, "settings": entries}
    (results.folder / SUMMARY).write_text(json.dumps(report, indent=2) + "\n")
    for metric in metrics:
        if any(metric in entry for entry in entries if entry["setting"] != DENSE):
            plot_budgets(entries, metric, str(results.folder / f"{metric}.png"))
    if all("depth" in row.info for row in results.rows):
        for entry in entries:
            _draw_depths(job, entry["setting"])


def _draw_depths(job: Job, setting: str) -> None:
    metric = job.task.metrics[0]
    found: dict[tuple[float, int], list[float]] = {}
    for row in job.results.rows:
        if row.setting == setting:
            cell = (row.info["depth"], row.info["length"])
            found.setdefault(cell, []).append(row.metrics[metric])
    means = {cell: sum(values) / len(values) for cell, values in found.items()}
    path = job.results.folder / f"depths-{setting}.png"
    plot_depths(means, metric, setting, str(path))


def _pool(folders: list[str], args: argparse.Namespace, console: Console) -> None:
    if len(folders) < 2:
        raise FasaError(f"pool takes two or more results folders, got {len(folders)}")
    pooled = pool([Path(folder) for folder in folders], args.min_dense)
    for table in pool_tables(pooled):
        console.print(table)
    for task, reason in pooled.left_out.items():
        console.print(f"{task} is left out: {reason}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    plot_budgets(pooled.entries, pooled.metric, str(out / f"{pooled.metric}.png"))
    report = {"pooled": folders, "left_out": pooled.left_out, "settings": pooled.entries}
    (out / SUMMARY).write_text(json.dumps(report, indent=2) + "\n")


def _compare(folders: list[str], console: Console) -> None:
    if len(folders) != 2:
        raise FasaError(f"compare takes two results folders, got {len(folders)}")
    changed, entries = compare(Path(folders[0]), Path(folders[1]))
    table = Table(title=f"{folders[1]} less {folders[0]}")
    for heading in ("setting", "metric", "samples", "one", "other", "difference (95 %)"):
        table.add_column(heading, justify="right")
    for entry in entries:
        low, high = entry["interval"]
        table.add_row(
            entry["setting"],
            entry["metric"],
            str(entry["samples"]),
            f"{entry['one']:.4f}",
            f"{entry['other']:.4f}",
            f"{entry['difference']:+.4f} ({low:+.4f} to {high:+.4f})",
        )
    console.print(table)
    for key, (one, other) in changed.items():
        console.print(f"{key}: {one} against {other}")
