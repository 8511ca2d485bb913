"""What each request of a batch does in one forward pass, and the report that its reply carries.

A step is recorded when it is launched and counted when its token is accepted, because overlap
scheduling may launch a step whose token is discarded.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fasa_sglang.backend.host import row_lengths
from fasa_sglang.backend.metrics import Usage
from fasa_sglang.backend.served import served_request
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.flashinfer_ext.lane import DENSE, Lane
from fasa_sglang.layer_plan import LayerPlan
from fasa_sglang.names import META_KEY, REQ_ATTRIBUTE
from fasa_sglang.pruning.state import PruneState
from fasa_sglang.requests import FasaRequest, dense_reason


@dataclass(frozen=True)
class LaneStep:
    """One request in one decode step.

    Args:
        request: The request's parameters if this step is sparse, else None.
        seq_len: Tokens of the request, including the current one.
        prompt_len: Tokens of the prompt.
        pruned: Generated tokens that have lost their KV slots.
    """

    request: FasaRequest | None
    seq_len: int
    prompt_len: int
    pruned: int = 0

    @property
    def live_len(self) -> int:
        """Tokens that still have a KV slot."""
        return self.seq_len - self.pruned

    @property
    def prunes(self) -> bool:
        """Whether pruning uses the selections of this step."""
        return self.request is not None and self.request.prune != "off"

    @property
    def full_prefix_len(self) -> int:
        """Leading tokens that are attended on top of the budget."""
        is_full = self.request is not None and self.request.prefix == "full"
        return self.prompt_len if is_full else 0

    @property
    def recent(self) -> int:
        """Latest tokens that are always attended: at least the current one, which has no label."""
        return 1 if self.request is None else max(1, self.request.recent)

    @property
    def attended_len(self) -> int:
        """Tokens that a KV head attends to in a selecting layer."""
        if self.request is None:
            return self.seq_len
        return min(self.live_len, self.full_prefix_len + self.request.budget)

    @property
    def planner_lane(self) -> Lane:
        """The step as the sparse-index planner takes it."""
        if self.request is None:
            return DENSE
        return Lane(
            budget=self.request.budget,
            sink=self.request.sink,
            recent=self.recent,
            dense_prefix=self.full_prefix_len,
            pruned=self.pruned,
            counts_from=self.prompt_len if self.prunes else None,
        )


@dataclass
class RequestState:
    """FASA's state of one request, stored on SGLang's ``Req``.

    Args:
        request: The request's parameters; None if it stays dense.
        dense_reason: Why a step of the request is dense, if one is.
        plan: What the layers of the model do.
        usage: Metrics of this scheduler.
        exact_len: Leading tokens whose keys and values equal those of a dense run; None means all.
            The keys and values of a sparsely decoded token differ from the second selecting layer
            on.
        prune: What the request has lost to pruning.
        launched: Steps whose token has not been accepted yet, the oldest first; None stands for a
            prefill.
        sparse_steps: Accepted sparse steps.
        dense_steps: Accepted dense decode steps.
        attended_rows: (token, layer) pairs that the accepted steps attended.
        all_rows: (token, layer) pairs that dense steps would have attended.
    """

    request: FasaRequest | None
    dense_reason: str
    plan: LayerPlan
    usage: Usage
    exact_len: int | None = None
    prune: PruneState = field(default_factory=PruneState)
    launched: deque[LaneStep | None] = field(default_factory=deque)
    sparse_steps: int = 0
    dense_steps: int = 0
    attended_rows: int = 0
    all_rows: int = 0

    def count(self) -> None:
        """Count the oldest launched step, whose token was accepted. Prefills are not counted."""
        lane = self.launched.popleft()
        if lane is None:
            return
        if lane.request is None:
            self.dense_steps += 1
        else:
            self.sparse_steps += 1
        attended = self.plan.rows_attended(lane.live_len, lane.attended_len)
        dense = self.plan.rows_attended(lane.seq_len, lane.seq_len)
        self.attended_rows += attended
        self.all_rows += dense
        self.usage.add_step(lane.request is not None, attended, dense)

    def finish(self) -> dict[str, Any]:
        """Count the request in the metrics and return the reply's ``meta_info["fasa"]``.

        Keys:
            sparse_steps, dense_steps: Decode steps of each kind.
            dense_reason: Why the dense steps were dense; None if there are none.
            kv_read_ratio: KV rows attended / KV rows that dense decoding would have attended; 1
                without a decode step.
            budget: Tokens attended per step; None if the request stays dense.
            pruned_tokens: Generated tokens that lost their KV slots.
        """
        ratio = self.attended_rows / self.all_rows if self.all_rows else 1.0
        self.usage.add_request(self.sparse_steps > 0, ratio)
        return {
            "sparse_steps": self.sparse_steps,
            "dense_steps": self.dense_steps,
            "dense_reason": self.dense_reason if self.dense_steps else None,
            "kv_read_ratio": round(ratio, 6),
            "budget": None if self.request is None else self.request.budget,
            "pruned_tokens": self.prune.total,
        }


def count_step(result: Any, processor: Any, i: int, req: Any, *args: Any, **kwargs: Any) -> None:
    """Count the step of an accepted token, and attach the report of a finished request.

    SGLang sends one entry of ``customized_info`` for each output token of a message. The last
    message of a reply carries at least one token, so a report on every token reaches the client
    with the last message, and the messages before it carry nothing.
    """
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None:
        return
    state.count()
    if req.finished():
        reports = {META_KEY: [state.finish()] * len(req.output_ids)}
        req.customized_info = {**(req.customized_info or {}), **reports}


def request_state(req: Any, config: FasaConfig, plan: LayerPlan, usage: Usage) -> RequestState:
    """The state of an SGLang ``Req``, created when the request is first scheduled."""
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None:
        request = request_of(req, config, plan)
        params = req.sampling_params.custom_params
        reason = dense_reason(request, params, config, _is_beam_search(req))
        state = RequestState(request, reason, plan, usage)
        setattr(req, REQ_ATTRIBUTE, state)
    return state


def request_of(req: Any, config: FasaConfig, plan: LayerPlan) -> FasaRequest | None:
    """The FASA parameters of an SGLang ``Req``; None if it stays dense.

    The tokenizer process checks requests first, but not on every route into the scheduler. A
    request that cannot be served is aborted with HTTP 400; the rest of the batch is unaffected.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    params = req.sampling_params.custom_params
    try:
        request = served_request(params, config, len(req.origin_input_ids), _is_beam_search(req))
        if request is not None and request.prune != "off" and not plan.reads_all_slots:
            raise RequestError(
                "fasa.prune does not work with this model, because some of its layers have a "
                "sliding window or a recurrent state; leave out fasa.prune"
            )
        return request
    except RequestError as error:
        req.to_finish = FINISH_ABORT(str(error), status_code=HTTPStatus.BAD_REQUEST)
        return None


def _is_beam_search(req: Any) -> bool:
    # SGLang 0.5.17 has no beam search.
    return getattr(req, "beam_group", None) is not None


def launch_step(batch: Any, config: FasaConfig, plan: LayerPlan, usage: Usage) -> list[LaneStep]:
    """Decide what each request of a ``ScheduleBatch`` does in the coming step, and record it.

    Returns:
        One entry per row of a decode batch; rows that belong to no request are dense. Empty for
        all other batches.
    """
    states = [request_state(req, config, plan, usage) for req in batch.reqs]
    if not batch.forward_mode.is_decode():
        # The first prefill or one after a retraction, which discards the steps in flight.
        for state in states:
            state.launched.clear()
            state.launched.append(None)
            state.exact_len = None
            state.prune.restart()
        return []
    lengths = row_lengths(batch)
    lanes = []
    for req, state, seq_len in zip(batch.reqs, states, lengths, strict=False):
        is_sparse = state.request is not None and seq_len >= config.min_seq_len
        lane = LaneStep(
            state.request if is_sparse else None,
            seq_len,
            len(req.origin_input_ids),
            state.prune.pruned,
        )
        state.launched.append(lane)
        if state.exact_len is None and lane.attended_len < seq_len:
            state.exact_len = seq_len - 1
        lanes.append(lane)
    lanes += [LaneStep(None, seq_len, seq_len) for seq_len in lengths[len(lanes) :]]
    return lanes
