"""Pruning inside SGLang's scheduler: frees slots of running requests before a step allocates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fasa_sglang.backend.host import protected_len, request_row, row_lengths
from fasa_sglang.backend.metrics import Usage
from fasa_sglang.backend.step import LaneStep, RequestState
from fasa_sglang.backend.thinking import thinking_end
from fasa_sglang.config import FasaConfig
from fasa_sglang.layer_plan import LayerPlan
from fasa_sglang.names import POOL_ATTRIBUTE, REQ_ATTRIBUTE
from fasa_sglang.pruning.importance import Importance
from fasa_sglang.pruning.policy import choose_victims, num_victims, prunable_range
from fasa_sglang.pruning.rows import live_slots, prune_row


class Pruner:
    """Prunes the requests of one model runner.

    Args:
        config: The server's settings.
        plan: What the layers of the model do.
        num_slots: Slots of the KV pool, the unused first one included.
        device: Device of the KV pool.
        usage: Receives the numbers of pruned and live tokens.

    Attributes:
        importance: Selection averages per KV slot, updated by the attention backend.
        tombstones: Pruned positions of all running requests.
    """

    def __init__(
        self,
        config: FasaConfig,
        plan: LayerPlan,
        num_slots: int,
        device: torch.device,
        usage: Usage,
    ) -> None:
        self.config, self.plan = config, plan
        self.usage = usage
        self.tombstones = 0
        self.importance = Importance(num_slots, device)
        self._rows_read = torch.cuda.Event() if device.type == "cuda" else None

    def start_averages(self, batch: Any, lanes: Sequence[LaneStep]) -> None:
        """Begin the averages of requests whose first sparse step is about to run.

        Must be called on the stream that the step runs on, before it.

        Args:
            batch: A decode ``ScheduleBatch``, its slots allocated.
            lanes: What its rows do in the step; lanes beyond its requests are ignored.
        """
        for req, lane in zip(batch.reqs, lanes, strict=False):
            if not lane.prunes:
                continue
            prune = getattr(req, REQ_ATTRIBUTE).prune
            if prune.scored_from is not None:
                continue
            # The step itself begins the average of its own token.
            prune.scored_from = lane.seq_len - 1
            row = batch.req_to_token_pool.req_to_token[request_row(req)]
            self.importance.start(row[lane.prompt_len : prune.scored_from].long())

    def rows_were_read(self) -> None:
        """Note that the coming step's slots were read, on the stream that the step runs on.

        SGLang prepares the next step on another stream, possibly before this one has begun.
        """
        if self._rows_read is not None:
            self._rows_read.record()

    def prune(self, batch: Any) -> None:
        """Free slots that a decode ``ScheduleBatch`` no longer needs.

        SGLang is about to allocate the slots of the batch's next tokens. A slot that the running
        step still reads is reused by the step after it at the earliest. Averages may be read before
        or after the running step updates them, so that step does not count as having scored a
        token.
        """
        rows = [i for i, req in enumerate(batch.reqs) if prunes(req)]
        if not rows:
            return
        if self._rows_read is not None:
            torch.cuda.current_stream().wait_event(self._rows_read)
        lengths = row_lengths(batch)
        for i in rows:
            self._prune_request(batch, batch.reqs[i], lengths[i])

    def _prune_request(self, batch: Any, req: Any, seq_len: int) -> None:
        state, prompt_len = getattr(req, REQ_ATTRIBUTE), len(req.origin_input_ids)
        request, prune = state.request, state.prune
        self._report(state, 0, seq_len - prompt_len - prune.pruned)
        if prune.scored_from is None:
            return
        think_end = thinking_end(req, self.config) if request.prune == "think" else None
        start, end = prunable_range(
            request,
            self.config,
            prompt_len=prompt_len,
            protected_len=protected_len(req),
            scored_from=prune.scored_from,
            seq_len=seq_len,
            think_end=think_end,
        )
        count = num_victims(
            request,
            self.config,
            pruned=prune.pruned,
            start=start,
            end=end,
            seq_len=seq_len,
            think_end=think_end,
        )
        if not count:
            return
        row = batch.req_to_token_pool.req_to_token[request_row(req)]
        victims = choose_victims(
            self.importance,
            row[start:end].long(),
            count,
            self.config.prune_rule,
            seed=hash((request.seed, seq_len)),
        )
        prune_row(row, start, victims, batch.token_to_kv_pool_allocator)
        self.tombstones += count
        prune.pruned += count
        prune.total += count
        self._report(state, count, seq_len - prompt_len - prune.pruned)
        # The radix tree must not receive a row with tombstones.
        state.exact_len = start if state.exact_len is None else min(state.exact_len, start)

    def _report(self, state: RequestState, pruned: int, live: int) -> None:
        """Update the metrics when tokens were pruned, and otherwise once per prune interval."""
        if pruned or abs(live - state.prune.live) >= self.config.prune_interval:
            self.usage.add_pruned(pruned, live - state.prune.live)
            state.prune.live = live

    def forget(self, req: Any) -> None:
        """Remove a request that gives up its slots from the metrics."""
        prune = getattr(req, REQ_ATTRIBUTE).prune
        if prune.live:
            self.usage.add_pruned(0, -prune.live)
            prune.live = 0

    def release(self, req: Any, start: int, end: int, tree_cache: Any) -> None:
        """Free the live slots of positions ``start`` to ``end`` of a request that ends.

        All tombstones of the request must lie in that range.
        """
        prune = getattr(req, REQ_ATTRIBUTE).prune
        row = tree_cache.req_to_token_pool.req_to_token[request_row(req)]
        live = live_slots(row[start:end], end - start - prune.pruned)
        tree_cache.token_to_kv_pool_allocator.free(live.to(torch.int64))
        self.tombstones -= prune.pruned
        prune.pruned = 0


def prune_requests(batch: Any, *args: Any, **kwargs: Any) -> None:
    """Free slots of running requests that prune; runs before a decode step allocates."""
    pruner = pruner_of(batch)
    if pruner is not None and batch.forward_mode.is_decode():
        pruner.prune(batch)


def retract_pruned_last(result: list[int], reqs: list[Any], *args: Any) -> list[int]:
    """Order pruned requests first: prefilled again, they would need the slots they gave back.

    SGLang retracts from the end of this list.
    """

    def is_pruned(i: int) -> bool:
        state = getattr(reqs[i], REQ_ATTRIBUTE, None)
        return state is not None and state.prune.pruned > 0

    return sorted(result, key=lambda i: not is_pruned(i))


def subtract_tombstones(result: tuple[int, int], checker: Any) -> tuple[int, int]:
    """Correct SGLang's leak check, which counts the slots of requests by their lengths."""
    pruner = pruner_of(checker.tree_cache)
    if pruner is None:
        return result
    return result[0] - pruner.tombstones, result[1]


def pruner_of(holder: Any) -> Pruner | None:
    """The pruner behind SGLang's batch, tree cache or scheduler; None without FASA."""
    return getattr(holder.req_to_token_pool, POOL_ATTRIBUTE, None)


def prunes(req: Any) -> bool:
    """Whether a scheduled request may lose generated tokens."""
    state = getattr(req, REQ_ATTRIBUTE, None)
    return state is not None and state.request is not None and state.request.prune != "off"
