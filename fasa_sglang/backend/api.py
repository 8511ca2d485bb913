"""Requests: the ``fasa`` switch, found wherever a client may write it, and checked.

A client may write it in ``custom_params``, in ``sampling_params`` (``/generate`` and
``Engine.generate``), or at the top level of an HTTP body, where SGLang silently drops unknown
fields. It always ends up in ``custom_params``, and is checked in the tokenizer process so that a
bad one is answered with HTTP 400 before anything is scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import HTTPException

from fasa_sglang.backend.metrics import count_refusal
from fasa_sglang.backend.served import fasa_config, served_request, uses_fasa
from fasa_sglang.errors import RequestError
from fasa_sglang.names import META_KEY
from fasa_sglang.requests import read_switch

_MISSING = object()
_CUSTOM_PARAMS = "custom_params"
# Objects in an HTTP body whose unknown entries SGLang drops: Python's OpenAI client merges
# ``extra_body`` into the body, but others send it as it is; ``options`` is Ollama's.
_DROPPED_OBJECTS = ("extra_body", "options")


def merged_params(custom_params: Any, switch: Any) -> dict[str, Any]:
    """``custom_params`` with the switch that a client wrote elsewhere.

    Raises:
        RequestError: The switch is in both places and they differ, or ``custom_params`` is not an
            object.
    """
    nested = read_switch(custom_params)
    params = dict(custom_params or {})
    if META_KEY in params and nested != switch:
        raise RequestError(
            f"fasa is given twice, as {nested!r:.80} in custom_params and as {switch!r:.80} beside "
            "it; give it once"
        )
    return {**params, META_KEY: switch}


def check_params(manager: Any, params: Mapping[str, Any]) -> None:
    """Refuse a request whose ``fasa`` cannot be served.

    Args:
        manager: SGLang's ``TokenizerManager``.
        params: The request's sampling parameters.

    Raises:
        RequestError: The switch or one of its parameters is wrong, or this server does not run
            FASA.
    """
    custom_params = params.get(_CUSTOM_PARAMS)
    if uses_fasa(manager.server_args):
        beam_width = params.get("beam_width")
        beam_search = isinstance(beam_width, int) and beam_width > 1
        config = fasa_config(manager.model_config)
        served_request(custom_params, config, prompt_len=0, beam_search=beam_search)
    elif read_switch(custom_params) not in (None, False):
        raise RequestError(
            "this server does not run FASA, so it cannot serve a request with fasa; start it "
            "with --attention-backend fasa"
        )


def check_request(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Move ``fasa`` into ``custom_params`` and check it, before SGLang reads the parameters.

    Raises:
        RequestError: See ``check_params``.
    """
    params = getattr(obj, "sampling_params", None) or {}
    with _refusals_counted(manager):
        if META_KEY in params:
            # The client's own dict may be used for several requests, so it is not modified.
            others = {key: value for key, value in params.items() if key != META_KEY}
            params = obj.sampling_params = _with_switch(others, params[META_KEY])
        check_params(manager, {**(manager.preferred_sampling_params or {}), **params})


def lift_body_field(manager: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
    """Copy ``fasa`` from the top level of an HTTP body, before a request is served.

    Raises:
        RequestError: The body holds it twice with different values, or where it would be dropped.
    """
    with _refusals_counted(manager):
        switch = _body_switch(request)
        if switch is _MISSING or not hasattr(obj, "sampling_params"):
            return
        if isinstance(obj.sampling_params, list):
            obj.sampling_params = [_with_switch(params, switch) for params in obj.sampling_params]
        else:
            obj.sampling_params = _with_switch(obj.sampling_params, switch)


def lift_openai_field(serving: Any, request: Any, raw_request: Any = None) -> None:
    """Copy ``fasa`` from the top level of an OpenAI request and check it, before conversion.

    A stream has not begun yet, so that its client gets HTTP 400 and not a broken stream.

    Raises:
        RequestError: See ``check_params`` and ``lift_body_field``.
    """
    manager = serving.tokenizer_manager
    try:
        with _refusals_counted(manager):
            switch = _body_switch(raw_request)
            if switch is not _MISSING:
                request.custom_params = merged_params(request.custom_params, switch)
            check_params(manager, {_CUSTOM_PARAMS: request.custom_params})
    except RequestError as error:
        if raw_request is not None:
            raw_request.state.fasa_refusal = str(error)
        raise


def check_body(serving: Any, request: Any, raw_request: Any = None) -> None:
    """Check ``fasa`` in the body of a route that converts no errors, or none before a stream.

    Raises:
        HTTPException: Status 400; see ``check_params`` and ``lift_body_field``.
    """
    manager = serving.tokenizer_manager
    try:
        with _refusals_counted(manager):
            switch = _body_switch(raw_request)
            if switch is not _MISSING:
                check_params(manager, {_CUSTOM_PARAMS: {META_KEY: switch}})
    except RequestError as error:
        raise HTTPException(400, str(error)) from error


def allow_in_contract(original: Callable[[Any], str | None], body: Any) -> str | None:
    """Hide ``fasa`` from SGLang 0.5.23's check for unknown fields in ``sampling_params``."""
    params = body.get("sampling_params") if isinstance(body, dict) else None
    if isinstance(params, dict) and META_KEY in params:
        known = {key: value for key, value in params.items() if key != META_KEY}
        body = {**body, "sampling_params": known}
    return original(body)


@contextmanager
def _refusals_counted(manager: Any) -> Iterator[None]:
    try:
        yield
    except RequestError:
        if uses_fasa(manager.server_args):
            count_refusal(manager.server_args)
        raise


def _with_switch(params: Mapping[str, Any] | None, switch: Any) -> dict[str, Any]:
    params = dict(params or {})
    return {**params, _CUSTOM_PARAMS: merged_params(params.get(_CUSTOM_PARAMS), switch)}


def _body_switch(request: Any) -> Any:
    """The switch in an HTTP body that FastAPI has parsed, or ``_MISSING``.

    Raises:
        RequestError: See ``lift_body_field``.
    """
    # Starlette caches the body that FastAPI parsed, so nothing has to be awaited here.
    body = getattr(request, "_json", None)
    if not isinstance(body, dict):
        return _MISSING
    for name in _DROPPED_OBJECTS:
        value = body.get(name)
        if isinstance(value, dict) and (META_KEY in value or _holds_switch(value)):
            raise RequestError(
                f"fasa inside {name} would be ignored; write it at the top level of the request "
                "body, beside model"
            )
    if META_KEY in body:
        return merged_params(body.get(_CUSTOM_PARAMS), body[META_KEY])[META_KEY]
    return body[_CUSTOM_PARAMS][META_KEY] if _holds_switch(body) else _MISSING


def _holds_switch(body: Mapping[str, Any]) -> bool:
    custom_params = body.get(_CUSTOM_PARAMS)
    return isinstance(custom_params, dict) and META_KEY in custom_params
