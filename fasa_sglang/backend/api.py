"""What clients send and read: the ``fasa`` switch wherever it may stand, and the report.

A request may carry ``fasa`` in ``custom_params``, in ``sampling_params`` (``/generate`` and
``Engine.generate``) or at the top level of an HTTP body, where SGLang drops what it does not know
without a word. All end in ``custom_params`` and are checked in the tokenizer process, so that a bad
one is answered with HTTP 400 before anything is scheduled.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.requests import Request

from fasa_sglang.backend.metrics import count_refusal
from fasa_sglang.backend.served import fasa_config, uses_fasa
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.names import META_KEY
from fasa_sglang.requests import parse_request

_MISSING = object()


def merged_params(custom_params: Any, asked: Any) -> dict[str, Any]:
    """``custom_params`` with ``fasa`` as a client gave it elsewhere.

    Raises:
        RequestError: It stands in both places and they differ, or ``custom_params`` is no object.
    """
    params = _object(custom_params)
    if params.get(META_KEY, asked) != asked:
        raise RequestError(
            f"fasa is given twice, as {params[META_KEY]!r:.80} in custom_params and as "
            f"{asked!r:.80} beside it; give it once"
        )
    return {**params, META_KEY: asked}


def check_params(manager: Any, custom_params: Any) -> None:
    """Refuse a ``fasa`` that cannot be served.

    Args:
        manager: SGLang's ``TokenizerManager``.
        custom_params: As the request carries them.

    Raises:
        RequestError: Says what is wrong with which key, or that this server does not run FASA.
    """
    params = _object(custom_params)
    if uses_fasa(manager.server_args):
        config = fasa_config(manager.model_config)
        request = parse_request(params, config, prompt_len=0)
        if request is not None and request.prune != "off":
            _require_prunable(manager.server_args, config, request.prune)
    elif params.get(META_KEY) not in (None, False):
        raise RequestError(
            "this server does not run FASA, so it cannot serve a request with fasa; start it "
            "with --attention-backend fasa"
        )


def check_request(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Before SGLang reads a request's ``sampling_params``: gather ``fasa`` and check it."""
    params = getattr(obj, "sampling_params", None) or {}
    with _refusals_counted(manager):
        if META_KEY in params:
            # The client's own dict may serve several requests; it is not changed.
            rest = {key: value for key, value in params.items() if key != META_KEY}
            params = obj.sampling_params = _with_fasa(rest, params[META_KEY])
        check_params(manager, params.get("custom_params"))


def lift_body_field(manager: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
    """Before ``/generate`` is served: take ``fasa`` from the top level of its body."""
    asked = _body_field(request)
    if asked is _MISSING or not hasattr(obj, "sampling_params"):
        return
    with _refusals_counted(manager):
        if isinstance(obj.sampling_params, list):
            obj.sampling_params = [_with_fasa(params, asked) for params in obj.sampling_params]
        else:
            obj.sampling_params = _with_fasa(obj.sampling_params, asked)


def allow_in_contract(original: Callable[[Any], str | None], body: Any) -> str | None:
    """SGLang 0.5.23 refuses what it does not know in ``sampling_params``; it need not know ours."""
    params = body.get("sampling_params") if isinstance(body, dict) else None
    if isinstance(params, dict) and META_KEY in params:
        known = {key: value for key, value in params.items() if key != META_KEY}
        body = {**body, "sampling_params": known}
    return original(body)


def lift_openai_field(serving: Any, request: Any, raw_request: Any = None) -> None:
    """Before an OpenAI request is converted: take ``fasa`` from its top level, and check.

    A stream has not begun yet, so that its client gets HTTP 400 and not a broken stream.
    """
    asked = _body_field(raw_request)
    with _refusals_counted(serving.tokenizer_manager):
        if asked is not _MISSING:
            request.custom_params = merged_params(request.custom_params, asked)
        check_params(serving.tokenizer_manager, request.custom_params)


def fold_report(
    original: Callable[..., AsyncGenerator[dict[str, Any], None]], *args: Any, **kwargs: Any
) -> AsyncIterator[dict[str, Any]]:
    """Turn the entries of a reply's tokens into one report.

    SGLang looks the request up when this is called, not when it is first awaited, so the
    original has to be called at once.
    """
    return _fold(original(*args, **kwargs), _raw_request(args, kwargs))


async def _fold(
    replies: AsyncGenerator[dict[str, Any], None], raw_request: Any
) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(replies):
        async for reply in replies:
            entries = reply.get("meta_info", {}).get(META_KEY)
            if isinstance(entries, list):
                report = next((entry for entry in reversed(entries) if entry), None)
                reply = {**reply, "meta_info": {**reply["meta_info"], META_KEY: report}}
                if report is not None and raw_request is not None:
                    _reports(raw_request).append(report)
            yield reply


def add_report(
    response: Any, serving: Any, request: Any, replies: list[dict[str, Any]], *args: Any
) -> Any:
    """Put the reports into the ``metadata`` of an OpenAI response, one per choice."""
    reports = [reply["meta_info"].get(META_KEY) for reply in replies]
    if any(reports) and hasattr(response, "metadata"):
        response.metadata = {**(response.metadata or {}), META_KEY: reports}
    return response


async def add_report_to_stream(
    original: Callable[..., AsyncIterator[str]], serving: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    """Put the reports into the usage chunk that ends an OpenAI stream.

    Only clients that asked for that chunk (``stream_options.include_usage``) know chunks without
    choices, so the others get no report.
    """
    raw_request = _raw_request(args, kwargs)
    async for line in original(serving, *args, **kwargs):
        if raw_request is not None and '"choices":[]' in line and '"usage":{' in line:
            chunk = json.loads(line.removeprefix("data: "))
            chunk["metadata"] = {**(chunk.get("metadata") or {}), META_KEY: _reports(raw_request)}
            line = f"data: {json.dumps(chunk)}\n\n"
        yield line


def _require_prunable(server_args: Any, config: FasaConfig, mode: str) -> None:
    if mode == "think" and not (server_args.reasoning_parser or config.think_end_ids):
        raise RequestError(
            "fasa.prune='think' needs to know where thinking ends; start the server with "
            "--reasoning-parser or with the setting think_end_ids, or ask for 'generated'"
        )
    if getattr(server_args, "enable_streaming_session", False):
        raise RequestError(
            f"fasa.prune={mode!r} does not work on a server with --enable-streaming-session, whose "
            "sessions keep their rows; leave it out"
        )


@contextmanager
def _refusals_counted(manager: Any) -> Iterator[None]:
    try:
        yield
    except RequestError:
        if uses_fasa(manager.server_args):
            count_refusal(manager.server_args)
        raise


def _object(custom_params: Any) -> dict[str, Any]:
    if custom_params is None:
        return {}
    if not isinstance(custom_params, dict):
        raise RequestError(f"custom_params must be an object, got {custom_params!r:.80}")
    return custom_params


def _with_fasa(params: Mapping[str, Any] | None, asked: Any) -> dict[str, Any]:
    params = dict(params or {})
    return {**params, "custom_params": merged_params(params.get("custom_params"), asked)}


def _body_field(request: Any) -> Any:
    """``fasa`` of an HTTP body that FastAPI has parsed; ``_MISSING`` if it is not there."""
    # Starlette keeps what the first reader parsed; nothing is awaited here.
    body = getattr(request, "_json", None)
    return body.get(META_KEY, _MISSING) if isinstance(body, dict) else _MISSING


def _raw_request(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request | None:
    """The HTTP request among a method's arguments, if there is one."""
    return next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Request)), None)


def _reports(raw_request: Any) -> list[dict[str, Any]]:
    """The reports of the choices of one HTTP request that have ended."""
    if not hasattr(raw_request.state, "fasa_reports"):
        raw_request.state.fasa_reports = []
    return raw_request.state.fasa_reports
