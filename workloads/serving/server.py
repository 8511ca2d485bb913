"""A server in a process of its own, for workloads that speak HTTP."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from fasa_sglang.own_command import own_command
from fasa_sglang.errors import FasaError

# SGLang's FlashInfer sampler and grammar compilers need a GPU, and no workload needs them.
PLAIN = ("--sampling-backend", "pytorch", "--grammar-backend", "none", "--log-level", "error")


@contextmanager
def running_server(model: str, *flags: str) -> Iterator[str]:
    """``fasa serve`` for the time of a ``with`` block; yields its address.

    Args:
        model: Hugging Face folder or hub name.
        flags: Of ``fasa serve`` and of SGLang.

    Raises:
        FasaError: The server ended before it served.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(own_command("serve", model, "--port", str(port), *PLAIN, *flags))
    url = f"http://127.0.0.1:{port}"
    # Ended by whatever manages jobs, the block is to end its server as it does after Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while not is_up(url):
            if server.poll() is not None:
                raise FasaError("the server ended before it served; the lines above say why")
            time.sleep(1)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)
        signal.signal(signal.SIGTERM, before)


def server_url(given: str) -> str:
    """The address a user gave, with or without the OpenAI API's path."""
    return given.rstrip("/").removesuffix("/v1")


def is_up(url: str) -> bool:
    """Whether a server answers there and is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def flush_prefix_cache(url: str) -> None:
    """Empty a server's prefix cache.

    Raises:
        FasaError: No SGLang server answers there.
    """
    try:
        request = urllib.request.Request(f"{url}/flush_cache", method="POST")
        with urllib.request.urlopen(request, timeout=60):
            pass
    except OSError as error:
        raise FasaError(f"no SGLang server answers at {url} ({error})") from error
