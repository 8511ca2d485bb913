"""``fasa eval``: how sparse decoding changes a model's answers, next to dense and null baselines.

Every sample is decoded densely and with every selector at every budget, by the same server, and
compared pair by pair.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fasa_sglang import __version__
from fasa_sglang.calibration import corpus
from fasa_sglang.calibration_cache import model_fingerprint
from fasa_sglang.errors import FasaError
from fasa_sglang.selectors import SELECTORS
from fasa_sglang.workloads.eval.decode import Job, Run, decode
from fasa_sglang.workloads.eval.report import report_comparison, report_pool, report_task
from fasa_sglang.workloads.eval.results import Results, folder_name
from fasa_sglang.workloads.eval.server_identity import of_running_server, of_started_server
from fasa_sglang.workloads.eval.settings import json_object, needs_choosing, parse_settings
from fasa_sglang.workloads.eval.task import HARNESSES, Options, Task, TaskOption
from fasa_sglang.workloads.eval.tasks import find_task, task_classes, task_names
from fasa_sglang.workloads.models.packaged import MODEL_HELP, find_model
from fasa_sglang.workloads.models.pretrained import load_tokenizer
from fasa_sglang.workloads.serving.server import given_or_running_server, server_url

COMPARE, POOL = "compare", "pool"
# Options that a comparison and a pool have; all others belong to tasks.
VERB_OPTIONS: dict[str, tuple[str, ...]] = {COMPARE: (), POOL: ("out", "min_dense")}
# Options that describe the server that this command starts.
SERVER_OPTIONS = ("settings", "calibration", "flags")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments, those of the tasks included."""
    harnesses = " or ".join(harness.harness for harness in HARNESSES)
    parser.add_argument(
        "tasks",
        nargs="+",
        metavar="TASK",
        help=f"{', '.join(task_names())}, or a task of {harnesses}; or: compare FOLDER FOLDER; "
        "or: pool FOLDER...",
    )
    parser.add_argument("--model", default="smollm2", help=MODEL_HELP)
    parser.add_argument("--selectors", default="fasa", help=f"of {','.join(SELECTORS)}")
    parser.add_argument(
        "--budgets", default="128,256,512,1024,2048", help="tokens per (request, KV head)"
    )
    parser.add_argument("--limit", type=int, default=100, help="largest number of samples per task")
    parser.add_argument("--length", type=int, default=4096, help="prompt length, in tokens")
    parser.add_argument("--max-tokens", type=int, help="reply length; default: the task's own")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of tasks that sample their replies"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text", metavar="FILE", help="text to build prompts from; default: Python's reference"
    )
    parser.add_argument(
        "--request",
        type=json_object,
        default={},
        metavar="JSON",
        help="extra fasa request keys, as JSON",
    )
    parser.add_argument(
        "--concurrency", type=int, help="requests in flight; default: 16 on a GPU, 1 on a CPU"
    )
    parser.add_argument("--out", metavar="FOLDER", default="results", help="parent of the results")
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", help="address of a running server with FASA")
    server.add_argument(
        "--settings",
        type=json_object,
        default={},
        metavar="JSON",
        help="FASA server settings, as JSON",
    )
    server.add_argument("--calibration", metavar="FILE", help="default: calibrate once and cache")
    server.add_argument("--flags", default="", help="further flags of SGLang, in one string")
    pool = parser.add_argument_group(POOL)
    pool.add_argument(
        "--min-dense",
        type=float,
        default=0.0,
        help="leave out tasks where dense decoding scores below this",
    )
    for title, options in _task_options().items():
        group = parser.add_argument_group(title)
        for option in options:
            kind: dict[str, Any] = {"action": "store_true"}
            if option.default is not False:
                kind = {"type": type(option.default), "default": option.default}
            group.add_argument(option.flag, help=option.help, **kind)
    # To tell which options were given.
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: A task, a dataset, a setting or the server is not available, an option does not
            apply, or rows were measured under different conditions.
    """
    console = Console(width=160)
    verb, *folders = args.tasks
    if verb in VERB_OPTIONS:
        own = {"command", "parser", "tasks", *VERB_OPTIONS[verb]}
        _refuse(args, [name for name in vars(args) if name not in own], f"fasa eval {verb}")
        if verb == COMPARE:
            report_comparison(folders, console)
        else:
            report_pool(folders, Path(args.out), args.min_dense, console)
        return
    _refuse(args, ["min_dense"], "a task; it belongs to fasa eval pool")
    if args.base_url:
        _refuse(args, SERVER_OPTIONS, "the running server of --base-url, which has its own")
    _evaluate(args, console)


def _evaluate(args: argparse.Namespace, console: Console) -> None:
    settings = parse_settings(args.selectors, args.budgets)
    tasks = [find_task(name) for name in args.tasks]
    names = [option.name for group in _task_options().values() for option in group]
    allowed = {option.name for task in tasks for option in task.task_options}
    others = [name for name in names if name not in allowed]
    _refuse(args, others, ", ".join(task.name for task in tasks))
    model = find_model(args.model)
    tokenizer = load_tokenizer(model)
    options = Options(
        limit=args.limit,
        length=args.length,
        seed=args.seed,
        text=corpus.text_file(args.text) if args.text else corpus.default_text(),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        own={name: getattr(args, name) for name in names},
    )
    concurrency = args.concurrency or (16 if torch.cuda.is_available() else 1)
    work = Run(model, tokenizer, settings, options, args.request, concurrency)
    fasa = _server_settings(work, args)
    if args.base_url:
        identity = of_running_server(server_url(args.base_url), model, settings)
    else:
        identity = of_started_server(model, fasa)
    jobs = [_job(task, work, identity, args) for task in tasks]
    flags = ["--settings", json.dumps(fasa), *_server_flags(work, args)]
    try:
        decode(jobs, work, given_or_running_server(args.base_url, model, *flags))
    except KeyboardInterrupt:
        raise FasaError(
            "interrupted; all finished samples are saved, run the command again to continue"
        ) from None
    finally:
        for job in jobs:
            job.results.close()
            if job.results.rows:
                report_task(job.task, job.results, console)


def _job(task: Task, work: Run, identity: dict[str, Any], args: argparse.Namespace) -> Job:
    conditions = {
        "task": task.name,
        "model": f"{Path(work.model).name} {model_fingerprint(work.model)}",
        "limit": work.options.limit,
        **task.conditions(work.options),
        "request": work.request,
        **identity,
        "fasa_sglang": __version__,
    }
    folder = Path(args.out) / folder_name(task.name, work.model, conditions)
    return Job(task, Results(folder, conditions), task.prepare(work.tokenizer, work.options))


def _server_settings(work: Run, args: argparse.Namespace) -> dict[str, Any]:
    """FASA settings of a server that is started for this evaluation."""
    budgets = [setting.budget for setting in work.settings if setting.budget is not None]
    fasa: dict[str, Any] = {"min_seq_len": 0, "max_budget": max(4096, *budgets, 0)}
    if needs_choosing(work.settings):
        fasa["selector"] = "any"
    if args.calibration:
        fasa["calibration"] = args.calibration
    return {**fasa, **args.settings}


def _server_flags(work: Run, args: argparse.Namespace) -> list[str]:
    flags = ["--enable-custom-logit-processor", "--max-running-requests", str(work.concurrency)]
    if needs_choosing(work.settings) and torch.cuda.is_available():
        for phase in ("decode", "prefill"):
            flags += [f"--cuda-graph-backend-{phase}", "disabled"]
    return [*flags, *shlex.split(args.flags)]


def _task_options() -> dict[str, tuple[TaskOption, ...]]:
    """The options that tasks declare themselves, by the name of the task or harness."""
    return {
        getattr(task, "harness", None) or task.name: tuple(task.task_options)
        for task in task_classes()
        if task.task_options
    }


def _refuse(args: argparse.Namespace, names: Iterable[str], place: str) -> None:
    """Refuse options that were given but have no effect.

    Raises:
        FasaError: Names the first one.
    """
    for name in names:
        if getattr(args, name) != args.parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise FasaError(f"{flag} does not apply to {place}; leave it out")
