"""Show how far a calibration is, in lines that a log file can hold."""

from __future__ import annotations

import sys
import time
from pathlib import Path

LINE_INTERVAL_SEC = 5.0


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
        """Report a layer.

        Args:
            stage: What is done to the layers, one after the other.
            done: Layers that are done.
            total: Layers of this stage.
        """
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

    def end(self, seconds: float, out: Path | None) -> None:
        """Report the end of a calibration.

        Args:
            seconds: How long it took.
            out: The file that was written; None if the calibration is not kept.
        """
        where = f"wrote {out}" if out is not None else "not kept, because the weights are random"
        print(f"calibration: done in {seconds:.1f} s, {where}", file=sys.stderr, flush=True)
