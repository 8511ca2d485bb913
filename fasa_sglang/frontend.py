"""``fasa=`` in SGLang programs: ``sgl.gen("answer", fasa=True)``, ``program.run(fasa={...})``.

A ``gen`` without ``fasa`` takes the value given to ``run`` or ``run_batch``, or else the server's
default. The server checks the parameters (see ``requests.FasaRequest``); a server without the
plugin ignores them and decodes densely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fasa_sglang.errors import RequestError, UnsupportedHostError
from fasa_sglang.hook import Hook

_ATTRIBUTE = "fasa"
_GENERATORS = ("gen", "gen_int", "gen_string")
_DEFAULT: ContextVar[Any] = ContextVar("fasa_default", default=None)


def gen(original: Callable[..., Any], *args: Any, fasa: Any = None, **kwargs: Any) -> Any:
    """``sgl.gen``, ``sgl.gen_int`` and ``sgl.gen_string`` with one more argument.

    Args:
        original: SGLang's function.
        args: Arguments of SGLang's function.
        fasa: True, False, or an object of request parameters; None leaves it to ``run``.
        kwargs: Keyword arguments of SGLang's function.

    Raises:
        RequestError: ``fasa`` has another type, or the expression has ``choices``, which SGLang
            ranks without decoding.
        UnsupportedHostError: SGLang's frontend has changed, so that ``fasa`` would be dropped.
    """
    from sglang.lang.ir import SglArgument

    expression = original(*args, **kwargs)
    # run_batch first traces a program with placeholders for its arguments.
    if fasa is None or isinstance(fasa, SglArgument):
        return expression
    if not hasattr(expression, "sampling_params"):
        raise RequestError(
            "fasa changes how tokens are decoded, but gen with choices decodes nothing; leave out "
            "fasa"
        )
    setattr(expression.sampling_params, _ATTRIBUTE, _checked(fasa))
    return expression


def run(original: Callable[..., Any], program: Any, *args: Any, **kwargs: Any) -> Any:
    """``SglFunction.run`` and ``run_batch`` with ``fasa`` for all ``gen`` calls of the program.

    Raises:
        RequestError: ``fasa`` is not true, false or an object.
        UnsupportedHostError: SGLang's frontend has changed, so that ``fasa`` would be dropped.
    """
    if _ATTRIBUTE in program.arg_names or _ATTRIBUTE not in kwargs:
        return original(program, *args, **kwargs)
    with _default(_checked(kwargs.pop(_ATTRIBUTE))):
        return original(program, *args, **kwargs)


def run_program(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Store the value given to ``run`` where all threads of the program read it."""
    params = next(arg for arg in (*args, *kwargs.values()) if hasattr(arg, "to_srt_kwargs"))
    if _DEFAULT.get() is not None:
        setattr(params, _ATTRIBUTE, _DEFAULT.get())
    return original(*args, **kwargs)


def resolve_sampling_params(result: Any, executor: Any, sampling_params: Any) -> None:
    """Overlay ``fasa`` on the program's default, as SGLang does for the fields it knows."""
    switch = getattr(sampling_params, _ATTRIBUTE, None)
    if switch is not None:
        setattr(result, _ATTRIBUTE, switch)


def clone(result: Any, sampling_params: Any) -> None:
    """Copy ``fasa`` too; SGLang copies the fields it knows."""
    resolve_sampling_params(result, None, sampling_params)


def to_srt_kwargs(result: dict[str, Any], sampling_params: Any) -> dict[str, Any]:
    """Add ``fasa`` to the parameters that are sent to an SGLang server."""
    switch = getattr(sampling_params, _ATTRIBUTE, None)
    return result if switch is None else {**result, "custom_params": {_ATTRIBUTE: switch}}


def to_openai_kwargs(result: dict[str, Any], sampling_params: Any) -> dict[str, Any]:
    """Add ``fasa`` to the parameters that ``sgl.OpenAI`` sends to an SGLang server."""
    switch = getattr(sampling_params, _ATTRIBUTE, None)
    if switch is None:
        return result
    return {**result, "extra_body": {"custom_params": {_ATTRIBUTE: switch}}}


def frontend_hooks() -> tuple[Hook, ...]:
    """The table of functions in SGLang's frontend language that are hooked."""
    from sglang.srt.plugins.hook_registry import HookType

    around, after = HookType.AROUND, HookType.AFTER
    program, params = "sglang.lang.ir.SglFunction", "sglang.lang.ir.SglSamplingParams"
    interpreter = "sglang.lang.interpreter"
    takes, carries = "takes the argument fasa from the user", "hands the argument to the threads"
    return (
        *(Hook(f"sglang.lang.api.{name}", gen, around, takes) for name in _GENERATORS),
        *(Hook(f"{program}.{name}", run, around, takes) for name in ("run", "run_batch")),
        *(
            Hook(f"{interpreter}.{name}", run_program, around, carries)
            for name in ("run_program", "run_program_batch")
        ),
        Hook(
            f"{interpreter}.StreamExecutor._resolve_sampling_params",
            resolve_sampling_params,
            after,
            "merges the parameters of one gen with those of run, field by field",
        ),
        Hook(f"{params}.clone", clone, after, "copies the parameters field by field"),
        Hook(f"{params}.to_srt_kwargs", to_srt_kwargs, after, "builds a request to SGLang"),
        Hook(
            f"{params}.to_openai_kwargs",
            to_openai_kwargs,
            after,
            "builds a request to OpenAI's API",
        ),
    )


def extend() -> None:
    """Install the hooks in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    for hook in frontend_hooks():
        HookRegistry.register(hook.target, hook.function, hook.kind)
    HookRegistry.apply_hooks()


def missing_frontend_hooks() -> list[str]:
    """Targets of ``frontend_hooks`` that SGLang could not patch; it logs them and goes on."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    targets = [hook.target for hook in frontend_hooks()]
    return [target for target in targets if target not in HookRegistry._patched]


@contextmanager
def _default(switch: Any) -> Iterator[None]:
    token = _DEFAULT.set(switch)
    try:
        yield
    finally:
        _DEFAULT.reset(token)


def _checked(switch: Any) -> Any:
    if switch is not None and not isinstance(switch, bool | Mapping):
        raise RequestError(f"fasa must be true, false or an object, got {switch!r:.80}")
    missing = missing_frontend_hooks()
    if missing:
        from sglang.version import __version__

        raise UnsupportedHostError(
            f"fasa= cannot reach the server, because SGLang {__version__} has no "
            f"{', '.join(missing)}; use SGLang 0.5.17 to 0.5.23, or send custom_params"
        )
    return switch
