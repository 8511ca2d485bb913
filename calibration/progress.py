"""Show how far a calibration is: a bar in a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LayerProgress = Callable[[str, int, int], None]
"""Called after every layer with the stage's name, the layers done, and the number of layers."""

LINE_INTERVAL_SEC = 5.0


@contextmanager
def progress_bar() -> Iterator[LayerProgress]:
    """Report the progress of a calibration on stderr for the duration of a ``with`` block."""
    if not sys.stderr.isatty():
        yield ProgressLines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield show


class ProgressLines:
    """Print a line at the start and end of a stage, and every few seconds between.

    Args:
        interval_sec: Time between two lines of a stage, in seconds.
    """

    def __init__(self, interval_sec: float = LINE_INTERVAL_SEC) -> None:
        self._interval_sec = interval_sec
        self._stage = ""
        self._start = self._last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report a layer; see ``LayerProgress``."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._start, self._last = stage, now, -self._interval_sec
        if done < total and now - self._last < self._interval_sec:
            return
        self._last = now
        line = f"calibration: {stage}, layer {done} of {total}"
        if 1 < done < total:
            # The time from the first layer's end on, because that is when the stage was first seen.
            left = (now - self._start) / (done - 1) * (total - done)
            line += f", about {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
