"""Servers are stopped whatever they do, and what they report is read right."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.serving import server as server_module
from fasa_sglang.workloads.serving.server import given_or_running_server, running_server
from fasa_sglang.workloads.serving.server_info import attention_backend, server_info

# Serves /health and ignores SIGTERM, together with a child that does the same.
STUBBORN = """
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    signal.pause()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_running_server_that_ignores_sigterm_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Waiting used to raise here, which left the server and the signal handler behind."""
    import psutil

    monkeypatch.setattr(server_module, "STOP_TIMEOUT_SEC", 1.0)
    monkeypatch.setattr(
        server_module, "own_command", lambda *args: [sys.executable, "-c", STUBBORN, *args]
    )
    handler = signal.getsignal(signal.SIGTERM)
    before = set(psutil.Process().children(recursive=True))
    with running_server("model"):
        started = set(psutil.Process().children(recursive=True)) - before
        assert len(started) == 2
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_running_server_that_ends_early_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        server_module, "own_command", lambda *args: [sys.executable, "-c", "raise SystemExit(3)"]
    )
    expected = pytest.raises(FasaError, match="the server ended before it was ready")
    with expected, running_server("model"):
        pytest.fail("there is no server")


def test_given_or_running_server_with_an_address_starts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started"))
    for address in ("http://host:1", "http://host:1/", "http://host:1/v1", "http://host:1/v1/"):
        with given_or_running_server(address, "model") as url:
            assert url == "http://host:1"


def test_server_info_without_a_server_raises() -> None:
    with pytest.raises(FasaError, match="no SGLang server answers at http://127"):
        server_info("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"attention_backend": "fa3"}, "fa3"),
        ({"attention_backend": "fa3", "decode_attention_backend": None}, "fa3"),
        ({"attention_backend": "fa3", "decode_attention_backend": "flashinfer"}, "fa3+flashinfer"),
        (
            {
                "attention_backend": "triton",
                "decode_attention_backend": "fasa",
                "prefill_attention_backend": "fasa",
            },
            "fasa",
        ),
    ],
)
def test_attention_backend_of_a_pair_names_both_halves(info: dict[str, Any], expected: str) -> None:
    assert attention_backend(info) == expected


def test_attention_backend_that_is_not_reported_raises() -> None:
    """A table must not name its baseline "None"."""
    with pytest.raises(FasaError, match="does not report which attention backend it uses"):
        attention_backend({"attention_backend": None})
