"""Servers for the tests, and the comparison of greedy replies of two runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from fasa_sglang.names import PLATFORM_NAME
from fasa_sglang.workloads.serving.greedy import MARGIN, agreeing_steps, divergence


class Agreement:
    """Replies that should be equal, and which share of their steps is.

    Near ties excuse single replies. The share before the first difference shows whether they
    are the exception: a broken backend diverges within a few steps, near tie or not.

    Args:
        near_tie: Largest lead of a token, in nats, that is a near tie.
    """

    def __init__(self, near_tie: float = MARGIN) -> None:
        self.problems: list[str] = []
        self._near_tie = near_tie
        self._agreeing = self._steps = 0

    def compare(self, expected: dict[str, Any], got: dict[str, Any], label: str = "") -> None:
        """Add one pair of replies, as ``divergence`` takes them."""
        problem = divergence(expected, got, self._near_tie)
        if problem is not None:
            self.problems.append(f"{label}: {problem}")
        self._agreeing += agreeing_steps(expected["output_ids"], got["output_ids"])
        self._steps += len(expected["output_ids"])

    @property
    def share(self) -> float:
        """Share of all steps that come before the first difference of their reply."""
        return self._agreeing / self._steps

    def require(self, minimum: float) -> None:
        """Fail on a divergence that is not a near tie, or if fewer steps agree than ``minimum``."""
        print(f"{self.share:.1%} of {self._steps} steps agree")
        assert not self.problems, "\n".join(self.problems)
        assert self.share >= minimum, f"only {self.share:.1%} of {self._steps} steps agree"


def server_command(model: Path, settings: dict[str, Any] | None, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--attention-backend", "fasa", "--dtype", "float32", "--device", "cpu"]
    command += ["--cuda-graph-backend-decode", "disabled"]
    command += ["--cuda-graph-backend-prefill", "disabled", "--sampling-backend", "pytorch"]
    command += ["--grammar-backend", "none", "--max-total-tokens", "6000"]
    command += ["--mem-fraction-static", "0.3"]
    if settings is not None:
        command += ["--json-model-override-args", json.dumps({"fasa": settings})]
    return [*command, *flags]


def cores_of_two_ranks(parallelism: str) -> str:
    """Value of ``SGLANG_CPU_OMP_THREADS_BIND`` for ``--tp-size 2`` or ``--pp-size 2``.

    SGLang 0.5.17 wants the cores of the tensor-parallel ranks, later releases those of all ranks.
    """
    # Imports SGLang, which conftest.py has to prepare first.
    from fasa_sglang.backend.host import CHECKS_BODIES

    cores = sorted(os.sched_getaffinity(0))
    if parallelism == "--pp-size" and not CHECKS_BODIES:
        return str(cores[0])
    return f"{cores[0]}|{cores[-1]}"


@contextmanager
def running_server(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """Start ``command`` on a free port and return its URL once it is healthy."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=server_environment(**environment),
            # Not the checkout, whose folders would hide the installed package.
            cwd=log.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(1)
            else:
                raise AssertionError(f"the server did not come up: {log.read_text()[-3000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(60)


def server_environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "SGLANG_PLATFORM": PLATFORM_NAME, "OMP_NUM_THREADS": "1", **changes}


def free_port() -> int:
    """A free port that leaves room for those that SGLang derives from it, up to 10,000 above."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= 55535:
            return port
