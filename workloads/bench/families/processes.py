"""Run every trial in a process of its own, because a server that ends ends its parent too."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.bench.families.trial import Trial, serve, serve_without_fasa
from fasa_sglang.workloads.models.families.family import Family
from fasa_sglang.workloads.models.families.table import FAMILIES
from fasa_sglang.workloads.serving.engine import import_sglang

TIMEOUT = 600.0
"""Seconds until a trial that hangs is ended."""
LOG, RESULT = "log", "trial.json"
Serving = Callable[[Family, Path], Trial]

_EXCEPTION = re.compile(
    r"^(?:(?P<module>[\w.]+)\.)?\w*(?:Error|Exception)\w*(?:: (?P<message>.*))?$", re.M
)


def run_trials(names: Iterable[str], report: Callable[[str, Trial], None]) -> dict[str, Trial]:
    """Try families one after another.

    Args:
        names: Names of families.
        report: Called with each name and trial as soon as it has ended.
    """
    # A fork has imported SGLang already, but a CUDA context does not survive it.
    method = "spawn" if torch.cuda.is_available() else "fork"
    if method == "fork":
        import_sglang()
    trials = {}
    for name in names:
        trial = _in_process(serve, name, method)
        if trial.sentence and not trial.refused:
            alone = _in_process(serve_without_fasa, name, method)
            trial = replace(trial, fails_alone=bool(alone.sentence))
        trials[name] = trial
        report(name, trial)
    return trials


def _in_process(serving: Serving, name: str, method: str) -> Trial:
    with tempfile.TemporaryDirectory(prefix="fasa-family-") as temporary:
        folder = Path(temporary)
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=_write_trial, args=(serving, name, folder))
        process.start()
        process.join(TIMEOUT)
        hung = process.is_alive()
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        if (folder / RESULT).exists():
            return Trial.from_dict(json.loads((folder / RESULT).read_text()))
        if hung:
            return Trial(sglang=version("sglang"), sentence=f"no answer after {TIMEOUT} s")
        return ended((folder / LOG).read_text(errors="replace"))


def _write_trial(serving: Serving, name: str, folder: Path) -> None:
    """The process of a trial: the leader of a group, with a log of all that its children write."""
    os.setsid()
    descriptor = os.open(folder / LOG, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    trial = serving(FAMILIES[name], folder / "model")
    (folder / RESULT).write_text(json.dumps(trial.to_dict()))


def ended(log: str) -> Trial:
    """The trial of a server that ended, by the last exception in its log.

    An exception without a message is told by the line of code that raised it.
    """
    found = list(_EXCEPTION.finditer(log))
    end = found[-1].start() if found else len(log)
    message = found[-1].group("message") if found else None
    before = (line.strip(" ^~") for line in reversed(log[:end].splitlines()))
    return Trial(
        sglang=version("sglang"),
        sentence=message or next(filter(None, before), "no output"),
        refused=bool(found) and found[-1].group("module") == FasaError.__module__,
    )
