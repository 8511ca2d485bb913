"""Asynchronous requests to a running SGLang server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from fasa_sglang.errors import FasaError

# A long reply of a CPU server can take this long.
TIMEOUT_SEC = 3600


class ServerEndedError(FasaError):
    """The server ended during a run; results so far are on disk, and a rerun continues."""


class Client:
    """Asynchronous requests to one server; use it in an ``async with`` block.

    Args:
        url: The server's address, without a path.
        concurrency: Largest number of requests in flight.
    """

    def __init__(self, url: str, concurrency: int) -> None:
        self.url = url
        self._in_flight = asyncio.Semaphore(concurrency)

    async def __aenter__(self) -> Client:
        # The semaphore limits the connections. None is reused: SGLang closes a connection that was
        # idle for 5 seconds, and a request sent at that moment is lost.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=TIMEOUT_SEC, limits=limits)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send one ``/generate`` request.

        Args:
            body: The request body of SGLang's native API.

        Returns:
            The decoded JSON reply.

        Raises:
            FasaError: The server refused the request.
            ServerEndedError: The server stopped answering.
        """
        async with self._in_flight:
            try:
                reply = await self._http.post(f"{self.url}/generate", json=body)
            except httpx.TransportError as error:
                raise ServerEndedError(
                    f"the server at {self.url} stopped answering ({type(error).__name__}); all "
                    "finished samples are saved, run the command again to continue"
                ) from error
        if reply.status_code != 200:
            raise FasaError(f"the server refused a request: {_reason(reply)}")
        return reply.json()


def _reason(reply: httpx.Response) -> str:
    try:
        error = reply.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
