"""What a running SGLang server or engine reports about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from fasa_sglang.errors import FasaError


def server_info(url: str) -> dict[str, Any]:
    """The resolved configuration of a server, as its ``/server_info`` endpoint returns it.

    Raises:
        FasaError: No SGLang server answers at ``url``.
    """
    return _get_json(url, "/server_info")


def server_device(url: str) -> str:
    """Name of the server's accelerator, or ``cpu``.

    Raises:
        FasaError: No SGLang server answers at ``url``.
    """
    return _get_json(url, "/v1/loads").get("accelerator") or "cpu"


def attention_backend(info: Mapping[str, Any]) -> str:
    """The attention backend that SGLang resolved.

    Args:
        info: Result of ``server_info`` or ``Engine.get_server_info``.

    Returns:
        One name; ``prefill+decode`` if SGLang prefills and decodes with different backends.

    Raises:
        FasaError: The server does not report a backend.
    """
    common = info.get("attention_backend")
    prefill, decode = (
        info.get(f"{phase}_attention_backend") or common for phase in ("prefill", "decode")
    )
    if prefill is None or decode is None:
        raise FasaError(
            "SGLang does not report which attention backend it uses, expected a name; run fasa "
            "doctor to check that its version is supported"
        )
    return prefill if prefill == decode else f"{prefill}+{decode}"


def _get_json(url: str, path: str) -> dict[str, Any]:
    try:
        reply = httpx.get(f"{url}{path}", timeout=60)
        reply.raise_for_status()
        return reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise FasaError(f"no SGLang server answers at {url} ({error})") from error
