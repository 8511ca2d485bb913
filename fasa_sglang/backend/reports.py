"""Replies: the report ``meta_info["fasa"]`` of each choice, carried to every API that answers.

SGLang drops ``meta_info`` when it builds the replies of its other APIs, so the reports of a request
are collected on the HTTP request and added to ``metadata``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import Request

from fasa_sglang.backend.api import check_body, lift_body_field
from fasa_sglang.names import META_KEY

# The last event of a /v1/responses stream, and the one of a /v1/messages stream with the usage.
_END_OF_RESPONSE = ("event: response.completed\n", "event: response.incomplete\n")
_END_OF_MESSAGE = ("event: message_delta\n",)


def serve_with_reports(
    original: Callable[..., AsyncGenerator[Any, None]],
    manager: Any,
    obj: Any,
    request: Any = None,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[Any]:
    """Take ``fasa`` from an HTTP body, serve the request, and collect the reports of its choices.

    Raises:
        RequestError: See ``lift_body_field``; raised by the call, not by the first iteration.
    """
    lift_body_field(manager, obj, request)
    return _collected(original(manager, obj, request, *args, **kwargs), request)


async def _collected(
    replies: AsyncGenerator[Any, None], raw_request: Any
) -> AsyncIterator[dict[str, Any] | list[dict[str, Any]]]:
    async with aclosing(replies):
        async for reply in replies:
            # A batch is a list; in a stream, each reply of a batch carries its index.
            for position, choice in enumerate(reply if isinstance(reply, list) else [reply]):
                report = _fold_entries(choice)
                if report is not None and isinstance(raw_request, Request):
                    _by_choice(raw_request)[choice.get("index", position)] = report
            yield reply


def _fold_entries(choice: dict[str, Any]) -> dict[str, Any] | None:
    """Replace SGLang's list with one entry per token by the report itself."""
    meta_info = choice.get("meta_info", {})
    entries = meta_info.get(META_KEY)
    if not isinstance(entries, list):
        return None
    report = entries[-1] if entries else None
    choice["meta_info"] = {**meta_info, META_KEY: report}
    return report


def add_report(
    response: Any, serving: Any, request: Any, replies: list[dict[str, Any]], *args: Any
) -> Any:
    """Put the reports into the ``metadata`` of an OpenAI response, one per choice."""
    reports = [reply["meta_info"].get(META_KEY) for reply in replies]
    if any(reports) and hasattr(response, "metadata"):
        response.metadata = {**(response.metadata or {}), META_KEY: reports}
    return response


async def add_report_to_stream(
    original: Callable[..., AsyncGenerator[str, None]], *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    """Put the reports into the usage chunk that ends an OpenAI stream, in the order of choices.

    Clients get that chunk only if they request it (``stream_options.include_usage``). Other clients
    do not expect a chunk without choices and get no report.
    """
    raw_request = _raw_request(args, kwargs)
    async with aclosing(original(*args, **kwargs)) as lines:
        async for line in lines:
            if raw_request is not None and '"choices":[]' in line and '"usage":{' in line:
                line = _edited(line, lambda chunk: _add_metadata(chunk, _reports(raw_request)))
            yield line


async def explain_refusal(
    original: Callable[..., Awaitable[Any]],
    serving: Any,
    request: Any,
    raw_request: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Add OpenAI's ``error`` object to a refusal by FASA.

    SGLang's chat and completion errors have its fields at the top level, where OpenAI's clients for
    JavaScript do not look for the message.
    """
    response = await original(serving, request, raw_request, *args, **kwargs)
    if raw_request is None or not hasattr(raw_request.state, "fasa_refusal"):
        return response
    body = json.loads(response.body)
    error = {key: value for key, value in body.items() if key != "object"}
    return JSONResponse({**body, "error": error}, response.status_code)


async def report_response(
    original: Callable[..., Awaitable[Any]],
    serving: Any,
    request: Any,
    raw_request: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Check a ``/v1/responses`` request before it starts, and report in its stream's last event.

    Raises:
        HTTPException: See ``check_body``.
    """
    check_body(serving, request, raw_request)
    result = await original(serving, request, raw_request, *args, **kwargs)
    if isinstance(result, AsyncGenerator) and raw_request is not None:
        return _with_report_in_event(result, raw_request, _END_OF_RESPONSE, key="response")
    return result


async def report_full_response(
    original: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
) -> Any:
    """Report in the ``metadata`` of a ``/v1/responses`` reply, stored or returned."""
    response = await original(*args, **kwargs)
    # The conversation context holds the last reply, except with the Harmony format of gpt-oss.
    replies = (getattr(arg, "last_output", None) for arg in (*args, *kwargs.values()))
    reply = next((reply for reply in replies if isinstance(reply, dict)), None)
    return response if reply is None else add_report(response, None, None, [reply])


async def refuse_message(
    original: Callable[..., Awaitable[Any]],
    serving: Any,
    request: Any,
    raw_request: Request,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Answer a refused ``/v1/messages`` request with HTTP 400, where SGLang 0.5.17 answers 500."""
    response = await original(serving, request, raw_request, *args, **kwargs)
    refusal = getattr(raw_request.state, "fasa_refusal", None)
    if refusal is None or response.status_code != 500:
        return response
    return serving._error_response(
        status_code=400, error_type="invalid_request_error", message=refusal
    )


async def report_message(original: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """Report in the ``metadata`` of a ``/v1/messages`` reply."""
    response = await original(*args, **kwargs)
    raw_request = _raw_request(args, kwargs)
    if raw_request is None or response.status_code != 200:
        return response
    body = json.loads(response.body)
    _add_metadata(body, _reports(raw_request))
    return JSONResponse(body)


def report_message_stream(
    original: Callable[..., AsyncGenerator[str, None]], *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    """Report in the ``metadata`` of the event of a ``/v1/messages`` stream that has the usage."""
    events, raw_request = original(*args, **kwargs), _raw_request(args, kwargs)
    if raw_request is None:
        return events
    return _with_report_in_event(events, raw_request, _END_OF_MESSAGE)


async def _with_report_in_event(
    events: AsyncGenerator[str, None],
    raw_request: Request,
    prefixes: tuple[str, ...],
    key: str | None = None,
) -> AsyncGenerator[str, None]:
    def edit(payload: dict[str, Any]) -> None:
        _add_metadata(payload if key is None else payload[key], _reports(raw_request))

    async with aclosing(events):
        async for event in events:
            yield _edited(event, edit) if event.startswith(prefixes) else event


def _edited(event: str, edit: Callable[[dict[str, Any]], None]) -> str:
    """A server-sent event with its JSON payload edited in place."""
    head, _, data = event.partition("data: ")
    payload = json.loads(data)
    edit(payload)
    return f"{head}data: {json.dumps(payload)}\n\n"


def _add_metadata(body: dict[str, Any], reports: list[dict[str, Any] | None]) -> None:
    if any(reports):
        body["metadata"] = {**(body.get("metadata") or {}), META_KEY: reports}


def _raw_request(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request | None:
    """The HTTP request among a method's arguments, if there is one."""
    return next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Request)), None)


def _by_choice(raw_request: Request) -> dict[int, dict[str, Any]]:
    """The reports of an HTTP request by the index of their choice."""
    if not hasattr(raw_request.state, "fasa_reports"):
        raw_request.state.fasa_reports = {}
    reports: dict[int, dict[str, Any]] = raw_request.state.fasa_reports
    return reports


def _reports(raw_request: Request) -> list[dict[str, Any] | None]:
    """The reports of an HTTP request in the order of choices; None for a choice without one."""
    by_choice = _by_choice(raw_request)
    return [by_choice.get(i) for i in range(max(by_choice, default=-1) + 1)]
