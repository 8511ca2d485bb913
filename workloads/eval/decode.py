"""Decode the samples of several tasks on one server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fasa_sglang.workloads.eval.results import Results
from fasa_sglang.workloads.eval.settings import Setting, needs_choosing
from fasa_sglang.workloads.eval.task import Options, Session, Task
from fasa_sglang.workloads.models.pretrained import load_config
from fasa_sglang.workloads.serving.server_info import server_info


@dataclass
class Job:
    """One task with its results folder.

    Args:
        task: The prepared task.
        results: Receives the rows.
        rows_per_setting: Rows that a finished setting has.
    """

    task: Task
    results: Results
    rows_per_setting: int

    def is_complete(self, settings: Sequence[Setting]) -> bool:
        """Whether all rows of all settings exist."""
        names = [row.setting for row in self.results.rows]
        return all(names.count(setting.name) >= self.rows_per_setting for setting in settings)


@dataclass
class Run:
    """What the jobs of one command share.

    Args:
        model: Hugging Face folder or hub name.
        tokenizer: The model's tokenizer.
        settings: What to decode every sample with.
        options: The command line's options for tasks.
        request: Further keys of every ``fasa`` parameter.
        concurrency: Largest number of requests in flight.
    """

    model: str
    tokenizer: Any
    settings: list[Setting]
    options: Options
    request: dict[str, Any]
    concurrency: int

    def fasa(self, setting: Setting) -> Any:
        """The ``fasa`` parameter of a setting's requests."""
        return setting.fasa(self.options.seed, self.request, needs_choosing(self.settings))


def decode(jobs: Sequence[Job], run: Run, server: AbstractContextManager[str]) -> None:
    """Decode whatever is missing; starts no server if all rows exist.

    Args:
        jobs: The tasks.
        run: What they share.
        server: Yields the address of the server.

    Raises:
        FasaError: The server refused a request or ended.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # The stream as it is now: a harness may redirect it while it runs.
        console=Console(file=sys.stderr),
    )
    total = sum(job.rows_per_setting for job in jobs) * len(run.settings)
    names = {setting.name for setting in run.settings}
    finished = sum(row.setting in names for job in jobs for row in job.results.rows)
    with progress:
        bar = progress.add_task("starting the server", total=total, completed=finished)
        if all(job.is_complete(run.settings) for job in jobs):
            return
        with server as url:
            context_len = _context_len(run.model, url)
            for job in jobs:
                progress.update(bar, description=job.task.name)
                session = Session(
                    url=url,
                    results=job.results,
                    tokenizer=run.tokenizer,
                    context_len=context_len,
                    concurrency=run.concurrency,
                    options=run.options,
                    fasa=run.fasa,
                    advance=lambda: progress.advance(bar),
                )
                job.task.evaluate(run.settings, session)


def _context_len(model: str, url: str) -> int:
    """Largest number of tokens that both the model and the server's pool can hold."""
    longest = load_config(model).get_text_config().max_position_embeddings
    return min(longest, server_info(url).get("max_total_num_tokens") or longest)
