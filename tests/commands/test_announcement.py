"""Waiting for a server: it ends when the server refuses to talk, or ends itself."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fasa_sglang.commands.announcement import announce
from fasa_sglang.commands.calibration_origin import CalibrationOrigin
from fasa_sglang.commands.server_flags import FIELDS, ServerFlags
from fasa_sglang.config import FasaConfig


@contextmanager
def answering(codes: dict[str, int]) -> Iterator[int]:
    """A server that answers each path with a status code and no content; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(codes[self.path])
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()


def announced(port: int, calibration: str, seconds_alive: float, **values: Any) -> str:
    """Announce a process that lives for some seconds, and return what is printed."""
    code = f"import time; time.sleep({seconds_alive})"
    process = subprocess.Popen([sys.executable, "-c", code])
    fields = dict.fromkeys(["argv", *FIELDS])
    flags = ServerFlags(**{**fields, "host": "127.0.0.1", "port": port, **values})
    output = io.StringIO()
    try:
        origin = CalibrationOrigin(Path(calibration), "given")
        announce(process, flags, FasaConfig(), origin, Console(file=output))
        assert (process.poll() is None) == (seconds_alive > 1)
    finally:
        process.kill()
        process.wait()
    return output.getvalue()


@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize("path", ["/health", "/server_info"])
def test_announce_of_a_server_that_refuses_us_gives_up_with_a_line(
    tiny_calibration: str, path: str, code: int
) -> None:
    with answering({"/health": 200, "/server_info": 200, path: code}) as port:
        text = announced(port, tiny_calibration, 60)
    assert f"the server answers {code}" in text and "size unknown" in text
    assert f"serving at http://127.0.0.1:{port}" in text


def test_announce_of_a_healthy_server_without_a_pool_size_says_so(tiny_calibration: str) -> None:
    with answering({"/health": 200, "/server_info": 200}) as port:
        text = announced(port, tiny_calibration, 60)
    assert "size unknown (/server_info does not tell)" in text


def test_announce_of_a_server_without_tls_where_tls_is_expected_gives_up(
    tiny_calibration: str,
) -> None:
    with answering({"/health": 200}) as port:
        text = announced(port, tiny_calibration, 60, ssl_certfile="c")
    assert "TLS refused" in text


def test_announce_of_a_server_that_ends_prints_nothing(tiny_calibration: str) -> None:
    with answering({"/health": 503}) as port:
        assert announced(port, tiny_calibration, 0.2) == ""
