"""The exact-prefix rule: the radix tree receives only what a dense run would have computed.

Keys and values that a sparse step computed belong to that request's approximation. From the tree,
other requests, dense ones included, would read them as exact. The same holds for the states of
layers with linear attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fasa_sglang.backend.host import TREE_INSERT_ARGUMENT, free_row_tail
from fasa_sglang.backend.pruner import pruner_of
from fasa_sglang.names import REQ_ATTRIBUTE


def limit_to_exact_prefix(result: int, req: Any) -> int:
    """Limit the leading tokens of an ending request that the radix tree may keep."""
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None or state.exact_len is None:
        return result
    return min(result, state.exact_len)


def keep_recurrent_state_exact(
    req: Any, tree_cache: Any, **kwargs: Any
) -> tuple[tuple[Any, Any], dict[str, Any]] | None:
    """Withhold an inexact request from a radix tree that also keeps recurrent states.

    The state of an ending request includes its sparse steps, and cannot be shortened to the exact
    prefix like its row. What the prefill gave to the tree stays there.
    """
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None or state.exact_len is None or not tree_cache.supports_mamba():
        return None
    return (req, tree_cache), {**kwargs, TREE_INSERT_ARGUMENT: False}


def free_inexact_tail(
    original: Callable[..., None], req: Any, start: int, end: int, tree_cache: Any
) -> None:
    """Free the slots that ``limit_to_exact_prefix`` withheld from the tree.

    SGLang's own function asserts that there are none.
    """
    state = getattr(req, REQ_ATTRIBUTE, None)
    pruner = pruner_of(tree_cache)
    if state is not None and pruner is not None:
        pruner.forget(req)
    if state is None or state.exact_len is None:
        original(req, start, end, tree_cache)
    elif pruner is not None and state.prune.pruned:
        pruner.release(req, start, end, tree_cache)
    elif start < end:
        free_row_tail(req, start, end, tree_cache)
