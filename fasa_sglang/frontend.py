"""``fasa=`` in SGLang programs: ``sgl.gen("answer", fasa=True)``, ``program.run(fasa={...})``.

A ``gen`` that says nothing takes what ``run`` or ``run_batch`` said, and the server's default if
they said nothing either. Servers without the plugin ignore the parameter and answer densely; what
the parameter may hold is in the README, and is checked by the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fasa_sglang.errors import RequestError

_ATTRIBUTE = "fasa"
_DEFAULT: ContextVar[Any] = ContextVar("fasa_default", default=None)


def gen(original: Callable[..., Any], *args: Any, fasa: Any = None, **kwargs: Any) -> Any:
    """``sgl.gen``, ``sgl.gen_int`` and ``sgl.gen_string`` with one more argument.

    Args:
        original: SGLang's function.
        fasa: True, False, or an object of request keys; None leaves it to ``run``.

    Raises:
        RequestError: ``fasa`` is something else, or the expression chooses among given answers,
            which SGLang ranks by prefills and not by decoding.
    """
    from sglang.lang.ir import SglArgument

    expression = original(*args, **kwargs)
    # run_batch first traces a program with placeholders for its arguments.
    if fasa is None or isinstance(fasa, SglArgument):
        return expression
    if not hasattr(expression, "sampling_params"):
        raise RequestError(
            "fasa says how to decode, but gen with choices decodes nothing; leave fasa out"
        )
    setattr(expression.sampling_params, _ATTRIBUTE, _checked(fasa))
    return expression


def run(original: Callable[..., Any], program: Any, *args: Any, **kwargs: Any) -> Any:
    """``SglFunction.run`` and ``run_batch`` with ``fasa`` for all of the program's ``gen``."""
    if _ATTRIBUTE in program.arg_names or _ATTRIBUTE not in kwargs:
        return original(program, *args, **kwargs)
    with _default(_checked(kwargs.pop(_ATTRIBUTE))):
        return original(program, *args, **kwargs)


def run_program(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Leave the default of ``run`` where every thread of the program finds it."""
    params = next(arg for arg in (*args, *kwargs.values()) if hasattr(arg, "to_srt_kwargs"))
    if _DEFAULT.get() is not None:
        setattr(params, _ATTRIBUTE, _DEFAULT.get())
    return original(*args, **kwargs)


def resolve_sampling_params(result: Any, executor: Any, sampling_params: Any) -> None:
    """SGLang copies the default and overlays the fields it knows; overlay ours."""
    asked = getattr(sampling_params, _ATTRIBUTE, None)
    if asked is not None:
        setattr(result, _ATTRIBUTE, asked)


def clone(result: Any, sampling_params: Any) -> None:
    """SGLang's clone copies the fields it knows; copy ours."""
    resolve_sampling_params(result, None, sampling_params)


def to_srt_kwargs(result: dict[str, Any], sampling_params: Any) -> dict[str, Any]:
    """What a program sends to an SGLang server."""
    asked = getattr(sampling_params, _ATTRIBUTE, None)
    return result if asked is None else {**result, "custom_params": {_ATTRIBUTE: asked}}


def to_openai_kwargs(result: dict[str, Any], sampling_params: Any) -> dict[str, Any]:
    """What a program sends through ``sgl.OpenAI`` to an SGLang server's OpenAI API."""
    asked = getattr(sampling_params, _ATTRIBUTE, None)
    if asked is None:
        return result
    return {**result, "extra_body": {"custom_params": {_ATTRIBUTE: asked}}}


def extend() -> None:
    """Hook SGLang's frontend language in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    program, params = "sglang.lang.ir.SglFunction", "sglang.lang.ir.SglSamplingParams"
    interpreter = "sglang.lang.interpreter"
    for name in ("gen", "gen_int", "gen_string"):
        HookRegistry.register(f"sglang.lang.api.{name}", gen, HookType.AROUND)
    for name in ("run", "run_batch"):
        HookRegistry.register(f"{program}.{name}", run, HookType.AROUND)
    for name in ("run_program", "run_program_batch"):
        HookRegistry.register(f"{interpreter}.{name}", run_program, HookType.AROUND)
    HookRegistry.register(
        f"{interpreter}.StreamExecutor._resolve_sampling_params",
        resolve_sampling_params,
        HookType.AFTER,
    )
    HookRegistry.register(f"{params}.clone", clone, HookType.AFTER)
    HookRegistry.register(f"{params}.to_srt_kwargs", to_srt_kwargs, HookType.AFTER)
    HookRegistry.register(f"{params}.to_openai_kwargs", to_openai_kwargs, HookType.AFTER)
    HookRegistry.apply_hooks()


@contextmanager
def _default(asked: Any) -> Iterator[None]:
    token = _DEFAULT.set(asked)
    try:
        yield
    finally:
        _DEFAULT.reset(token)


def _checked(asked: Any) -> Any:
    if asked is None or isinstance(asked, bool | Mapping):
        return asked
    raise RequestError(f"fasa must be true, false or an object, got {asked!r:.80}")
