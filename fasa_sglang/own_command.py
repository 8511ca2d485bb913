"""Run this package's command line in a process of its own."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def own_command(*arguments: str) -> list[str]:
    """The command that runs ``fasa`` with these arguments.

    ``-P`` keeps a checkout in the working directory from hiding the installed package.
    """
    code = "import sys; from fasa_sglang.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-P", "-c", code, *arguments]


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Let SIGTERM raise ``SystemExit`` inside the block, so that ``finally`` clauses run."""

    def exit_now(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, exit_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
