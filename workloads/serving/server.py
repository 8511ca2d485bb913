"""A server in a process of its own, for workloads that use HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fasa_sglang.errors import FasaError
from fasa_sglang.own_command import own_command
from fasa_sglang.workloads.serving.engine import AUTO, device_arguments

# SGLang's FlashInfer sampler and its grammar compilers need a GPU, and no workload needs them.
PLAIN = ("--sampling-backend", "pytorch", "--grammar-backend", "none", "--log-level", "error")
STOP_TIMEOUT_SEC = 120.0


@contextmanager
def running_server(model: str, *flags: str) -> Iterator[str]:
    """Run ``fasa serve`` for the duration of a ``with`` block; yields its address.

    Args:
        model: Hugging Face folder or hub name.
        flags: Flags of ``fasa serve`` and of SGLang.

    Raises:
        FasaError: The server ended before it was ready.
    """
    with _running(own_command("serve", model, *PLAIN, *flags)) as url:
        yield url


@contextmanager
def running_baseline(model: str, backend: str, *flags: str) -> Iterator[str]:
    """Run SGLang without FASA for the duration of a ``with`` block; yields its address.

    Args:
        model: Hugging Face folder or hub name.
        backend: Attention backend; ``auto`` lets SGLang choose.
        flags: Further flags of SGLang.

    Raises:
        FasaError: The server ended before it was ready.
    """
    command = [sys.executable, "-P", "-m", "sglang.launch_server", "--model-path", model, *PLAIN]
    if backend != AUTO:
        command += ["--attention-backend", backend]
    for name, value in device_arguments().items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with _running([*command, *flags]) as url:
        yield url


@contextmanager
def given_or_running_server(base_url: str | None, model: str, *flags: str) -> Iterator[str]:
    """The address of a server that a user named, or of one that runs for the block.

    Args:
        base_url: Address of a running server, with or without the path of the OpenAI API; None
            starts one.
        model: See ``running_server``.
        flags: See ``running_server``.
    """
    if base_url:
        yield server_url(base_url)
        return
    with running_server(model, *flags) as url:
        yield url


@contextmanager
def _running(command: Sequence[str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A process group of its own, so that a server that does not stop can be killed as a whole.
    server = subprocess.Popen([*command, "--port", str(port)], start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    # A job manager's SIGTERM must stop the server, as Ctrl-C does.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while not is_up(url):
            if server.poll() is not None:
                raise FasaError("the server ended before it was ready; see the lines above")
            time.sleep(1)
        yield url
    finally:
        try:
            stop(server)
        finally:
            signal.signal(signal.SIGTERM, handler)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ask a server to stop, and kill its process group if it does not do so in time."""
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_SEC)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def server_url(address: str) -> str:
    """A server's address without a trailing slash and without the path of the OpenAI API."""
    return address.rstrip("/").removesuffix("/v1")


def is_up(url: str) -> bool:
    """Whether a server answers at ``url`` and is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def flush_prefix_cache(url: str) -> None:
    """Empty a server's prefix cache.

    Raises:
        FasaError: No SGLang server answers at ``url``.
    """
    try:
        request = urllib.request.Request(f"{url}/flush_cache", method="POST")
        with urllib.request.urlopen(request, timeout=60):
            pass
    except OSError as error:
        raise FasaError(f"no SGLang server answers at {url} ({error})") from error
