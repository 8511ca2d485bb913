"""What each lane of a batch does in one forward pass, and what a request's reply reports.

A step is recorded when it is launched and counted when its token is accepted: under overlap
scheduling a step may be launched whose token is discarded.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fasa_sglang.backend.host import row_lengths
from fasa_sglang.backend.metrics import Usage
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.flashinfer_ext.lane import DENSE, Lane
from fasa_sglang.layer_plan import LayerPlan
from fasa_sglang.names import META_KEY, REQ_ATTRIBUTE
from fasa_sglang.pruning.state import PruneState
from fasa_sglang.requests import FasaRequest, parse_request


@dataclass(frozen=True)
class LaneStep:
    """One request in one decode step.

    Args:
        request: The request's parameters if this step is sparse, else None.
        seq_len: Tokens of the request, the current one included.
        prompt_len: Tokens of the prompt.
        pruned: Generated tokens that have lost their slots.
    """

    request: FasaRequest | None
    seq_len: int
    prompt_len: int
    pruned: int = 0

    @property
    def live_len(self) -> int:
        """Tokens that still have a slot."""
        return self.seq_len - self.pruned

    @property
    def prunes(self) -> bool:
        """Whether the step's selections are counted for pruning."""
        return self.request is not None and self.request.prune != "off"

    @property
    def full_prefix_len(self) -> int:
        """First tokens that are attended on top of the budget."""
        full = self.request is not None and self.request.prefix == "full"
        return self.prompt_len if full else 0

    @property
    def recent(self) -> int:
        """Last tokens that are attended; the current one always is, and has no label yet."""
        return 1 if self.request is None else max(1, self.request.recent)

    @property
    def attended_len(self) -> int:
        """Tokens that a KV head attends to in a layer that selects."""
        if self.request is None:
            return self.seq_len
        return min(self.live_len, self.full_prefix_len + self.request.budget)

    @property
    def planner_lane(self) -> Lane:
        """The step in the planner's terms."""
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
    """FASA's bookkeeping of one running request; lives on SGLang's ``Req``.

    Args:
        request: The request's parameters; None if it stays dense.
        plan: What the layers of the model do.
        usage: Where the steps of the whole server are counted.
        exact_len: Leading tokens whose keys and values equal those of a dense run; None means all.
            A token that was decoded sparsely has different ones from the second sparse layer on.
        prune: What the request has lost to pruning.
    """

    request: FasaRequest | None
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
        """Count the oldest launched step: its token was accepted. Prefills do not count."""
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
        """The reply's ``meta_info["fasa"]``; without a decode step the read ratio is 1."""
        ratio = self.attended_rows / self.all_rows if self.all_rows else 1.0
        self.usage.add_request(self.sparse_steps > 0, ratio)
        return {
            "sparse_steps": self.sparse_steps,
            "dense_steps": self.dense_steps,
            "kv_read_ratio": round(ratio, 6),
            "budget": None if self.request is None else self.request.budget,
            "pruned_tokens": self.prune.total,
        }


def count_step(result: Any, processor: Any, i: int, req: Any, *args: Any, **kwargs: Any) -> None:
    """Count an accepted token's step; leave a finished request's report for its reply.

    SGLang sends the entries of the output tokens that a message carries. The last message carries
    at least one token, and before it there is nothing to send, so steps cost nothing here.
    """
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None:
        return
    state.count()
    if req.finished():
        reports = {META_KEY: [state.finish()] * len(req.output_ids)}
        req.customized_info = {**(req.customized_info or {}), **reports}


def request_state(req: Any, config: FasaConfig, plan: LayerPlan, usage: Usage) -> RequestState:
    """The state of an SGLang ``Req``, made when the request is first scheduled."""
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None:
        state = RequestState(request_of(req, config), plan, usage)
        setattr(req, REQ_ATTRIBUTE, state)
    return state


def request_of(req: Any, config: FasaConfig) -> FasaRequest | None:
    """The FASA parameters of an SGLang ``Req``.

    The tokenizer process has checked them, but not on every route into the scheduler. Parameters
    that cannot be served end that request with HTTP 400 and leave the others alone.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    try:
        return parse_request(req.sampling_params.custom_params, config, len(req.origin_input_ids))
    except RequestError as error:
        req.to_finish = FINISH_ABORT(str(error), status_code=HTTPStatus.BAD_REQUEST)
        return None


def launch_step(batch: Any, config: FasaConfig, plan: LayerPlan, usage: Usage) -> list[LaneStep]:
    """Decide what every lane of a ``ScheduleBatch`` does now, and record it for its reply.

    Returns:
        One entry per row of a decode batch; rows that belong to no request are dense. Empty for
        every other batch.
    """
    states = [request_state(req, config, plan, usage) for req in batch.reqs]
    if not batch.forward_mode.is_decode():
        # A prefill, the first or one after a retraction: steps in flight before it never finish.
        for state in states:
            state.launched.clear()
            state.launched.append(None)
            state.exact_len = None
            state.prune.restart()
        return []
    lens = row_lengths(batch)
    lanes = []
    for req, state, seq_len in zip(batch.reqs, states, lens, strict=False):
        sparse = state.request is not None and seq_len >= config.min_seq_len
        lane = LaneStep(
            state.request if sparse else None,
            seq_len,
            len(req.origin_input_ids),
            state.prune.pruned,
        )
        state.launched.append(lane)
        if state.exact_len is None and lane.attended_len < seq_len:
            state.exact_len = seq_len - 1
        lanes.append(lane)
    lanes += [LaneStep(None, seq_len, seq_len) for seq_len in lens[len(lanes) :]]
    return lanes
