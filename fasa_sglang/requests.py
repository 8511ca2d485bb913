"""What one request asks for: ``custom_params={"fasa": ...}``, parsed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.selectors import SELECTORS

PREFIX_MODES = ("select", "full")
PRUNE_MODES = ("off", "think", "generated")


@dataclass(frozen=True)
class FasaRequest:
    """The FASA parameters of a request that uses it, every default filled in.

    Args:
        budget: Tokens attended per (request, KV head) and step; ``sink`` and ``recent`` inside.
        sink: First tokens that are always attended.
        recent: Last tokens that are always attended.
        prefix: ``select`` chooses among all tokens; ``full`` attends to the whole prompt and
            spends the budget on generated tokens only.
        prune: Which generated tokens may lose their KV slots: none (``off``), those of the
            thinking (``think``), or all (``generated``).
        prune_budget: How many of them stay.
        selector: What ranks the tokens; one of ``SELECTORS``.
        seed: Of the ``random`` selector.
    """

    budget: int
    sink: int
    recent: int
    prefix: str = "select"
    prune: str = "off"
    prune_budget: int = 4096
    selector: str = "fasa"
    seed: int = 0


def parse_request(
    custom_params: Mapping[str, Any] | None, config: FasaConfig, prompt_len: int
) -> FasaRequest | None:
    """Read the ``fasa`` entry of a request's ``custom_params``.

    Args:
        custom_params: As sent; other entries are left alone. None counts as empty.
        config: The server's settings, which fill in what the request leaves out.
        prompt_len: Tokens of the prompt; decides for requests that leave it to the server.

    Returns:
        None if the request stays dense.

    Raises:
        RequestError: An unknown key, a wrong type or a value that cannot be served.
    """
    asked = None if custom_params is None else custom_params.get("fasa")
    if asked is None:
        by_default = config.default == "on" or (
            config.default == "auto" and prompt_len >= config.min_seq_len
        )
        return FasaRequest(**_defaults(config)) if by_default else None
    if asked is False:
        return None
    if asked is True:
        asked = {}
    if not isinstance(asked, Mapping):
        raise RequestError(f"fasa must be true, false or an object, got {asked!r:.80}")
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
    for key in asked:
        if key not in parsers:
            raise RequestError(
                f"fasa has no key {str(key)!r:.80}, expected one of {', '.join(parsers)}"
            )
    values = {key: parsers[key](f"fasa.{key}", value) for key, value in asked.items()}
    request = FasaRequest(**{**_defaults(config), **values})
    least = request.sink + request.recent + 1
    if not least <= request.budget <= config.max_budget:
        raise RequestError(
            f"fasa.budget must be from sink + recent + 1 = {least} to the server's max_budget = "
            f"{config.max_budget} tokens, got {request.budget}"
        )
    kept = request.sink + config.prune_recent + config.prune_grace
    if request.prune != "off" and request.prune_budget < kept:
        raise RequestError(
            f"fasa.prune_budget must be at least {kept}, the sum of sink, prune_recent and "
            f"prune_grace, got {request.prune_budget}"
        )
    if request.prune != "off" and request.selector != "fasa":
        raise RequestError(
            "fasa.prune needs the selector 'fasa', whose selections decide what is pruned, got "
            f"{request.selector!r}; leave out fasa.prune, or compare pruning rules with the server "
            "setting prune_rule"
        )
    return request


def _defaults(config: FasaConfig) -> dict[str, Any]:
    selector = "fasa" if config.selector == "any" else config.selector
    shared = ("budget", "sink", "recent", "prune_budget", "seed")
    return {**{name: getattr(config, name) for name in shared}, "selector": selector}


def _integer(minimum: int) -> Any:
    def parse(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise RequestError(
                f"{name} must be an integer of at least {minimum}, got {value!r:.80}"
            )
        return value

    return parse


def _one_of(allowed: tuple[str, ...]) -> Any:
    def parse(name: str, value: Any) -> str:
        if value not in allowed:
            raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {value!r:.80}")
        return value

    return parse
