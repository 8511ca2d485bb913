"""The requests of an evaluation to a running SGLang server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from fasa_sglang.errors import FasaError

# Long replies of a CPU server take this long.
TIMEOUT_SEC = 3600


class ServerEndedError(FasaError):
    """The server went away; what was written is kept and a rerun goes on."""


class Client:
    """Asynchronous requests to one server; use it in an ``async with`` block.

    Args:
        url: The server's address, without a path.
        concurrency: Most requests at once.
    """

    def __init__(self, url: str, concurrency: int) -> None:
        self.url = url
        self._at_once = asyncio.Semaphore(concurrency)

    async def __aenter__(self) -> Client:
        # No limit of connections: the semaphore is the limit. None is used twice: SGLang closes
        # one that was idle for 5 seconds, and a request sent just then is lost.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=TIMEOUT_SEC, limits=limits)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """One ``/generate`` request.

        Args:
            body: As SGLang's native API takes it.

        Returns:
            The reply.

        Raises:
            FasaError: The server refused the request.
            ServerEndedError: It does not answer any more.
        """
        async with self._at_once:
            try:
                reply = await self._http.post(f"{self.url}/generate", json=body)
            except httpx.TransportError as error:
                raise ServerEndedError(
                    f"the server at {self.url} stopped answering ({type(error).__name__}); all "
                    "samples that came back are kept, run the command again to go on"
                ) from error
        if reply.status_code != 200:
            raise FasaError(f"the server refused a request: {_reason(reply)}")
        return reply.json()


def server_info(url: str) -> dict[str, Any]:
    """What the server says of itself.

    Raises:
        FasaError: No SGLang server answers there.
    """
    try:
        reply = httpx.get(f"{url}/get_server_info", timeout=60)
        reply.raise_for_status()
        return reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise FasaError(f"no SGLang server answers at {url} ({error})") from error


def _reason(reply: httpx.Response) -> str:
    try:
        error = reply.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
