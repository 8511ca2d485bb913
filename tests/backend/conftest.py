"""A real server over HTTP, one for every file that asks for it.

Not one for all files: shutting an engine down kills all children of the process.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving import free_port, server_command, server_environment


@pytest.fixture(scope="module")
def server(
    tiny_path: Path, tiny_calibration: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    port = free_port()
    settings = {
        "calibration": tiny_calibration,
        "min_seq_len": 0,
        "max_budget": 1024,
        "budget": 128,
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            server_command(tiny_path, settings, "--port", str(port), "--enable-metrics"),
            env=server_environment(),
            # Not the checkout, whose folders would hide the installed package.
            cwd=log.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}"
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
                pytest.fail(f"the server did not come up: {log.read_text()[-3000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(60)
