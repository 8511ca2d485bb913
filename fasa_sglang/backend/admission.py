"""Admission that counts on pruning: with the setting ``prune_admission``, and off by default.

A request that prunes never holds more than its prompt, ``prune_budget`` and ``prune_interval``
tokens, so it needs no more room than that, and its reply may be longer than the pool. The price: it
cannot be prefilled again whole, so if it loses its slots after all, it is aborted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fasa_sglang.backend.pruner import Pruner, is_thinking, pruner_of, think_end
from fasa_sglang.backend.step import request_of
from fasa_sglang.names import REQ_ATTRIBUTE
from fasa_sglang.requests import FasaRequest

logger = logging.getLogger(__name__)


def growth(pruner: Pruner | None, req: Any) -> int | None:
    """Slots by which a request will still grow at most; None if pruning does not bound it."""
    if pruner is None or not pruner.config.prune_admission:
        return None
    request = _request(pruner, req)
    if request is None or request.prune == "off":
        return None
    if request.prune == "think" and (
        think_end(req, pruner.config) is not None or not is_thinking(req, pruner.config)
    ):
        return None
    state = getattr(req, REQ_ATTRIBUTE, None)
    live = len(req.output_ids) - (0 if state is None else state.prune.pruned)
    # Until a request is long enough to be sparse, nothing is pruned.
    start = pruner.config.min_seq_len - len(req.origin_input_ids)
    most = max(request.prune_budget, start) + pruner.config.prune_interval
    return max(pruner.config.prune_interval, most - live)


def allow_replies_beyond_pool(original: Callable[..., None], scheduler: Any, req: Any) -> None:
    """Let a reply that is pruned all through be longer than the pool, up to the context length."""
    asked = req.sampling_params.max_new_tokens
    original(scheduler, req)
    pruner = pruner_of(scheduler)
    request = None if pruner is None else _request(pruner, req)
    if growth(pruner, req) is None or request is None or request.prune != "generated":
        return
    room = scheduler.model_config.context_len - len(req.origin_input_ids) - 2
    wanted = [n for n in (asked, scheduler.max_new_tokens_limit) if n is not None and n > 0]
    params = req.sampling_params
    params.max_new_tokens = max(params.max_new_tokens, min([room, *wanted]))


def cap_admission_reservation(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """Admit a request with room for what pruning leaves of it.

    SGLang's admission reads from ``max_new_tokens`` how much a request will grow. For requests that
    ignore EOS where no prefixes are cached it has another rule, which reads the same of all that
    run; here they go by the common one.
    """
    pruner = pruner_of(adder.tree_cache)
    if pruner is None or not pruner.config.prune_admission:
        return original(adder, req, *args, **kwargs)
    bound = growth(pruner, req)
    params = req.sampling_params
    asked = params.max_new_tokens, params.ignore_eos
    if bound is not None:
        params.max_new_tokens = min(params.max_new_tokens, len(req.output_ids) + bound)
    params.ignore_eos = False
    try:
        return original(adder, req, *args, **kwargs)
    finally:
        params.max_new_tokens, params.ignore_eos = asked


def cap_running_reservation(result: float, adder: Any, req: Any) -> float:
    """What a running request is still reserved."""
    bound = growth(pruner_of(adder.tree_cache), req)
    return result if bound is None else min(result, bound)


def abort_unrecoverable_retractions(
    result: tuple[list[Any], float, list[Any]], batch: Any, *args: Any
) -> tuple[list[Any], float, list[Any]]:
    """A retracted request is prefilled again whole; one that has outgrown the pool never could be.

    It would block the queue for ever.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    retracted, ratio, aborted = result
    pruner = pruner_of(batch)
    kept = []
    for req in retracted:
        bound = growth(pruner, req)
        tokens = len(req.origin_input_ids) + len(req.output_ids)
        if bound is None or tokens + bound + 1 < batch.token_to_kv_pool_allocator.size:
            kept.append(req)
            continue
        req.to_finish = FINISH_ABORT(
            f"The KV pool is full, and this pruned request of {tokens} tokens cannot be prefilled "
            "again. Retry later, or ask for a smaller prune_budget.",
            status_code=HTTPStatus.SERVICE_UNAVAILABLE,
        )
        logger.warning("FASA: aborted pruned request %s, the pool is full", req.rid)
        aborted.append(req)
    return kept, ratio, aborted


def _request(pruner: Pruner, req: Any) -> FasaRequest | None:
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is not None:
        return state.request
    # Not scheduled yet.
    return request_of(req, pruner.config)
