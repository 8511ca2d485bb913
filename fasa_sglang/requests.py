"""The FASA parameters of one request: the ``fasa`` entry of ``custom_params``, parsed and checked.

The entry is called the switch below: true, false, or an object of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.names import META_KEY
from fasa_sglang.selectors import SELECTORS

PREFIX_MODES = ("select", "full")
PRUNE_MODES = ("off", "think", "generated")

OFF_FOR_REQUEST = "fasa is off for this request"
OFF_BY_DEFAULT = "the request does not set fasa and the server's default is off"
BEAM_SEARCH = "beam search always decodes densely"


@dataclass(frozen=True)
class FasaRequest:
    """The parameters of a request that uses FASA, with all defaults filled in.

    Args:
        budget: Tokens attended per (request, KV head) and step; includes ``sink`` and ``recent``.
        sink: Number of leading tokens that are always attended.
        recent: Number of latest tokens that are always attended.
        prefix: ``select`` selects among all tokens; ``full`` attends to the whole prompt and
            spends the budget on generated tokens only.
        prune: Which generated tokens may lose their KV slots: none (``off``), those of the
            thinking (``think``), or all (``generated``).
        prune_budget: Generated tokens to keep.
        selector: Ranking rule; a key of ``SELECTORS``.
        seed: Seed of the ``random`` selector.
    """

    budget: int
    sink: int
    recent: int
    prefix: str = "select"
    prune: str = "off"
    prune_budget: int = 4096
    selector: str = "fasa"
    seed: int = 0


def read_switch(custom_params: Any) -> Any:
    """The ``fasa`` entry of a request's ``custom_params``; None if it is not set.

    Raises:
        RequestError: ``custom_params`` is neither None nor an object.
    """
    if custom_params is None:
        return None
    if not isinstance(custom_params, Mapping):
        raise RequestError(f"custom_params must be an object, got {custom_params!r:.80}")
    return custom_params.get(META_KEY)


def parse_request(
    custom_params: Any, config: FasaConfig, prompt_len: int, beam_search: bool = False
) -> FasaRequest | None:
    """Read and check the FASA parameters of a request.

    Args:
        custom_params: As the client sent it; entries other than ``fasa`` are ignored.
        config: The server's settings, which supply the defaults.
        prompt_len: Tokens of the prompt; decides under ``default: auto``.
        beam_search: Whether the request sets ``beam_width`` to more than 1. It stays dense where
            the server's default would turn FASA on.

    Returns:
        None if the request stays dense for its whole life.

    Raises:
        RequestError: An unknown key, a wrong type, or a value that cannot be served.
    """
    switch = read_switch(custom_params)
    if switch is None:
        by_default = config.default == "on" or (
            config.default == "auto" and prompt_len >= config.min_seq_len
        )
        return FasaRequest(**_defaults(config)) if by_default and not beam_search else None
    if switch is False:
        return None
    values = {} if switch is True else _parse_values(switch, config)
    if beam_search:
        raise RequestError("fasa does not work with beam search; leave out fasa or beam_width")
    request = FasaRequest(**{**_defaults(config), **values})
    smallest = request.sink + request.recent + 1
    if not smallest <= request.budget <= config.max_budget:
        raise RequestError(
            f"fasa.budget must be from sink + recent + 1 = {smallest} to the server's max_budget = "
            f"{config.max_budget} tokens, got {request.budget}"
        )
    protected = request.sink + config.prune_recent + config.prune_grace
    if request.prune != "off" and request.prune_budget < protected:
        raise RequestError(
            f"fasa.prune_budget must be at least {protected}, the sum of sink, prune_recent and "
            f"prune_grace, got {request.prune_budget}"
        )
    if request.prune != "off" and request.selector != "fasa":
        raise RequestError(
            "fasa.prune needs the selector 'fasa', whose selections decide what is pruned, got "
            f"{request.selector!r}; leave out fasa.prune, or compare pruning rules with the server "
            "setting prune_rule"
        )
    return request


def dense_reason(
    request: FasaRequest | None, custom_params: Any, config: FasaConfig, beam_search: bool = False
) -> str:
    """Why a step of a request is dense, if one is.

    Args:
        request: What ``parse_request`` returned for the other arguments, or None if it raised.
        custom_params: See ``parse_request``.
        config: See ``parse_request``.
        beam_search: See ``parse_request``.
    """
    short = f"shorter than min_seq_len = {config.min_seq_len} tokens"
    if request is not None:
        return short
    if not isinstance(custom_params, Mapping) or custom_params.get(META_KEY) is None:
        if config.default == "off":
            return OFF_BY_DEFAULT
        if beam_search:
            return BEAM_SEARCH
        return f"the request does not set fasa and its prompt is {short}"
    return OFF_FOR_REQUEST


def _parse_values(switch: Any, config: FasaConfig) -> dict[str, Any]:
    if not isinstance(switch, Mapping):
        raise RequestError(f"fasa must be true, false or an object, got {switch!r:.80}")
    parsers = {
        "budget": _integer(minimum=1),
        "sink": _integer(minimum=0),
        "recent": _integer(minimum=0),
        "prefix": _one_of(PREFIX_MODES),
        "prune": _one_of(PRUNE_MODES),
        "prune_budget": _integer(minimum=1),
    }
    if config.selector == "any":
        parsers |= {"selector": _one_of(tuple(SELECTORS)), "seed": _integer(minimum=0)}
    for key in switch:
        if key not in parsers:
            raise RequestError(
                f"fasa has no key {str(key)!r:.80}, expected one of {', '.join(parsers)}"
            )
    return {key: parsers[key](f"{META_KEY}.{key}", value) for key, value in switch.items()}


def _defaults(config: FasaConfig) -> dict[str, Any]:
    selector = "fasa" if config.selector == "any" else config.selector
    shared = ("budget", "sink", "recent", "prune_budget", "seed")
    return {**{name: getattr(config, name) for name in shared}, "selector": selector}


def _integer(minimum: int) -> Callable[[str, Any], int]:
    def parse(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise RequestError(
                f"{name} must be an integer of at least {minimum}, got {value!r:.80}"
            )
        return value

    return parse


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, Any], str]:
    def parse(name: str, value: Any) -> str:
        if value not in allowed:
            raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {value!r:.80}")
        return value

    return parse
