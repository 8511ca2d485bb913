"""Pruning inside SGLang's scheduler: frees slots of running requests before a step allocates."""

from __future__ import annotations

from typing import Any

import torch

from fasa_sglang.backend.host import protected_len, request_row, row_lengths
from fasa_sglang.backend.metrics import Usage
from fasa_sglang.backend.step import RequestState
from fasa_sglang.config import FasaConfig
from fasa_sglang.names import POOL_ATTRIBUTE, REQ_ATTRIBUTE
from fasa_sglang.pruning.importance import Importance
from fasa_sglang.pruning.policy import (
    choose_victims,
    live_slots,
    num_victims,
    prunable_range,
    prune_row,
)


class Pruner:
    """Prunes the requests of one model runner.

    Args:
        config: The server's settings.
        num_slots: Slots of the KV pool, the unused first one included.
        device: Of the pool.
        usage: Counts what is pruned.

    Attributes:
        importance: Selection averages per KV slot, updated by the attention backend.
        tombstones: Pruned positions of all running requests.
    """

    def __init__(
        self, config: FasaConfig, num_slots: int, device: torch.device, usage: Usage
    ) -> None:
        self.config = config
        self.usage = usage
        self.tombstones = 0
        self.importance = Importance(num_slots, device)
        self._rows_read = torch.cuda.Event() if device.type == "cuda" else None

    def rows_were_read(self) -> None:
        """The coming step's slots were taken from the rows, on the stream it runs on.

        SGLang prepares a step while the one before it may not even have begun, on another stream.
        """
        if self._rows_read is not None:
            self._rows_read.record()

    def prune(self, batch: Any) -> None:
        """Free what a decode ``ScheduleBatch`` does not need any more.

        SGLang is about to allocate the slots of its next tokens. What the step in flight still
        reads is reused by the step after it at the earliest; the averages it is about to write may
        be taken before or after, which is a step more or less of many.
        """
        if self._rows_read is not None:
            torch.cuda.current_stream().wait_event(self._rows_read)
        for req, seq_len in zip(batch.reqs, row_lengths(batch), strict=False):
            state = getattr(req, REQ_ATTRIBUTE, None)
            if state is None or state.request is None or state.request.prune == "off":
                continue
            self._count(state, 0, seq_len - len(req.origin_input_ids) - state.prune.pruned)
            # Right after a prefill its step may still be running.
            if req.decode_batch_idx < 1 or seq_len < self.config.min_seq_len:
                continue
            request = state.request
            thought = think_end(req, self.config)
            if request.prune == "think" and thought is None and not is_thinking(req, self.config):
                continue
            start, end = prunable_range(
                request,
                self.config,
                prompt_len=len(req.origin_input_ids),
                protected_len=protected_len(req),
                seq_len=seq_len,
                think_end=thought,
            )
            count = num_victims(
                request,
                self.config,
                pruned=state.prune.pruned,
                start=start,
                end=end,
                seq_len=seq_len,
                think_end=thought,
            )
            if not count:
                continue
            row = batch.req_to_token_pool.req_to_token[request_row(req)]
            seed = hash((request.seed, seq_len))
            victims = choose_victims(
                self.importance, row[start:end].long(), count, self.config.prune_rule, seed
            )
            prune_row(row, start, victims, batch.token_to_kv_pool_allocator)
            self.tombstones += count
            state.prune.pruned += count
            state.prune.total += count
            self._count(state, count, seq_len - len(req.origin_input_ids) - state.prune.pruned)
            # The radix tree must not learn of rows with holes.
            state.exact_len = start if state.exact_len is None else min(state.exact_len, start)

    def _count(self, state: RequestState, pruned: int, live: int) -> None:
        """Tell the metrics: when tokens were pruned, and otherwise once an interval."""
        if pruned or abs(live - state.prune.live) >= self.config.prune_interval:
            self.usage.add_pruned(pruned, live - state.prune.live)
            state.prune.live = live

    def forget(self, req: Any) -> None:
        """A request gives up its slots, whatever the reason."""
        state = getattr(req, REQ_ATTRIBUTE)
        if state.prune.live:
            self.usage.add_pruned(0, -state.prune.live)
            state.prune.live = 0

    def release(self, req: Any, start: int, end: int, tree_cache: Any) -> None:
        """Give back what is left of positions ``start`` to ``end`` of a request that ends.

        All its tombstones lie there, and each slot is given back once.
        """
        state = getattr(req, REQ_ATTRIBUTE)
        row = tree_cache.req_to_token_pool.req_to_token[request_row(req)]
        live = live_slots(row[start:end], end - start - state.prune.pruned)
        tree_cache.token_to_kv_pool_allocator.free(live.to(torch.int64))
        self.tombstones -= state.prune.pruned
        state.prune.pruned = 0


def prune_requests(batch: Any, *args: Any, **kwargs: Any) -> None:
    """Free slots of running requests that prune; runs before a decode step allocates."""
    pruner = pruner_of(batch)
    if pruner is not None and batch.forward_mode.is_decode():
        pruner.prune(batch)


def retract_pruned_last(result: list[int], reqs: list[Any], *args: Any) -> list[int]:
    """Put pruned requests first: prefilled again, they would need all their slots.

    SGLang retracts from the end of this list.
    """

    def pruned(i: int) -> bool:
        state = getattr(reqs[i], REQ_ATTRIBUTE, None)
        return state is not None and state.prune.pruned > 0

    return sorted(result, key=lambda i: not pruned(i))


def subtract_tombstones(result: tuple[int, int], checker: Any) -> tuple[int, int]:
    """Correct SGLang's check of a busy pool, which counts requests' slots by their lengths."""
    pruner = pruner_of(checker.tree_cache)
    if pruner is None:
        return result
    return result[0] - pruner.tombstones, result[1]


def pruner_of(holder: Any) -> Pruner | None:
    """The pruner behind a batch, a tree cache or a scheduler of SGLang; None without FASA."""
    return getattr(holder.req_to_token_pool, POOL_ATTRIBUTE, None)


def think_end(req: Any, config: FasaConfig) -> int | None:
    """The position at which a request's thinking ended; None if it has not, or nobody knows."""
    prompt_len = len(req.origin_input_ids)
    if config.think_end_ids:
        ends = set(config.think_end_ids)
        for i, token in enumerate(req.output_ids):
            if token in ends:
                return prompt_len + i
        return None
    if req.require_reasoning and req._is_reasoning_over:
        return prompt_len + req.reasoning_tokens
    return None


def is_thinking(req: Any, config: FasaConfig) -> bool:
    """Whether a request that has not ended its thinking is in it."""
    return bool(config.think_end_ids) or bool(req.require_reasoning)
