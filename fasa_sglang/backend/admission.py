"""Admission that counts on pruning, with the setting ``prune_admission``.

A request that prunes holds a bounded number of generated tokens, so it needs no more room than
that, and its reply may be longer than the pool. The price: if it loses its slots and no longer fits
the pool when prefilled whole, it is aborted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fasa_sglang.backend.pruner import Pruner, pruner_of
from fasa_sglang.backend.step import request_of
from fasa_sglang.backend.thinking import thinking_end
from fasa_sglang.config import FasaConfig
from fasa_sglang.names import REQ_ATTRIBUTE
from fasa_sglang.pruning.state import PruneState
from fasa_sglang.requests import FasaRequest

logger = logging.getLogger(__name__)


def max_growth(pruner: Pruner | None, req: Any) -> int | None:
    """Upper bound of the KV slots that a request will still add; None if pruning sets no bound."""
    if pruner is None or not pruner.config.prune_admission:
        return None
    request = _request(pruner, req)
    if request is None or request.prune == "off":
        return None
    if request.prune == "think" and thinking_end(req, pruner.config) is not None:
        return None
    config, prune = pruner.config, _prune_state(req)
    live = len(req.output_ids) - prune.pruned
    most = max(request.prune_budget, _unpruned_tokens(req, config, prune)) + config.prune_interval
    return max(config.prune_interval, most - live)


def _unpruned_tokens(req: Any, config: FasaConfig, prune: PruneState) -> int:
    """Tokens that a request generates before any of them may be pruned."""
    prompt_len = len(req.origin_input_ids)
    scored_from = prune.scored_from
    if scored_from is None:
        scored_from = max(config.min_seq_len, prompt_len + len(req.output_ids) + 1) - 1
    # The last step may still be running and does not count.
    return scored_from + config.prune_grace + 1 - prompt_len


def allow_replies_beyond_pool(original: Callable[..., None], scheduler: Any, req: Any) -> None:
    """Let a reply that is pruned throughout exceed the pool, up to the context length."""
    requested = req.sampling_params.max_new_tokens
    original(scheduler, req)
    pruner = pruner_of(scheduler)
    request = None if pruner is None else _request(pruner, req)
    if max_growth(pruner, req) is None or request is None or request.prune != "generated":
        return
    room = scheduler.model_config.context_len - len(req.origin_input_ids) - 2
    limits = [n for n in (requested, scheduler.max_new_tokens_limit) if n is not None and n > 0]
    params = req.sampling_params
    params.max_new_tokens = max(params.max_new_tokens, min([room, *limits]))


def cap_admission_reservation(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """Admit a request with room for the tokens that pruning leaves it.

    SGLang derives a request's growth from ``max_new_tokens``. For requests that ignore EOS on a
    server without a prefix cache it follows another rule, which reads ``max_new_tokens`` of all
    running requests as well; here these requests follow the common rule.
    """
    pruner = pruner_of(adder.tree_cache)
    if pruner is None or not pruner.config.prune_admission:
        return original(adder, req, *args, **kwargs)
    bound = max_growth(pruner, req)
    params = req.sampling_params
    requested = params.max_new_tokens, params.ignore_eos
    if bound is not None:
        params.max_new_tokens = min(params.max_new_tokens, len(req.output_ids) + bound)
    params.ignore_eos = False
    try:
        return original(adder, req, *args, **kwargs)
    finally:
        params.max_new_tokens, params.ignore_eos = requested


def cap_running_reservation(result: float, adder: Any, req: Any) -> float:
    """Limit the slots that stay reserved for a running request."""
    bound = max_growth(pruner_of(adder.tree_cache), req)
    return result if bound is None else min(result, bound)


def abort_unrecoverable_retractions(
    result: tuple[list[Any], float, list[Any]], batch: Any, *args: Any
) -> tuple[list[Any], float, list[Any]]:
    """Abort retracted requests that have outgrown the pool.

    SGLang would prefill them again whole. They never fit, so they would block the queue forever.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    retracted, ratio, aborted = result
    pruner = pruner_of(batch)
    recoverable = []
    for req in retracted:
        bound = max_growth(pruner, req)
        tokens = len(req.origin_input_ids) + len(req.output_ids)
        if bound is None or tokens + bound + 1 < batch.token_to_kv_pool_allocator.size:
            recoverable.append(req)
            continue
        req.to_finish = FINISH_ABORT(
            f"The KV pool is full, and this pruned request of {tokens} tokens no longer fits it "
            "when prefilled again. Retry later, or use a smaller prune_budget.",
            status_code=HTTPStatus.SERVICE_UNAVAILABLE,
        )
        logger.warning("FASA: aborted pruned request %s because the KV pool is full", req.rid)
        aborted.append(req)
    return recoverable, ratio, aborted


def _request(pruner: Pruner, req: Any) -> FasaRequest | None:
    """FASA's parameters of a request that may not have been scheduled yet."""
    state = getattr(req, REQ_ATTRIBUTE, None)
    return request_of(req, pruner.config, pruner.plan) if state is None else state.request


def _prune_state(req: Any) -> PruneState:
    state = getattr(req, REQ_ATTRIBUTE, None)
    return PruneState() if state is None else state.prune
