"""One entry of a hook table: what is patched in SGLang, by what, and why there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hook:
    """A function of SGLang and the function of ours that is attached to it.

    Args:
        target: Dotted name of SGLang's function.
        function: Our function. A BEFORE hook takes the call's arguments, an AFTER hook the result
            and the arguments, an AROUND hook the original function and the arguments.
        kind: How our function is attached; one of SGLang's ``HookType``.
        reason: Why this is the right place.
    """

    target: str
    function: Callable[..., Any]
    kind: Any
    reason: str
