"""What each lane of a batch does in one forward pass, and what a request's reply reports.

The record of a step is made when the step is launched and counted when its token is accepted:
under overlap scheduling a step may be launched whose token is thrown away.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fasa_sglang.backend.metrics import Usage
from fasa_sglang.config import FasaConfig
from fasa_sglang.memory.pruning import PruneState
from fasa_sglang.requests import FasaRequest, parse_request

REQ_ATTRIBUTE = "fasa"


@dataclass(frozen=True)
class LaneStep:
    """One request in one decode step.

    Args:
        request: Its parameters if this step is sparse, else None.
        seq_len: Tokens of the request, the current one included.
        prompt_len: Tokens of its prompt.
        pruned: Generated tokens among them that have lost their slots.
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
        """Whether its selections are counted."""
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
        """Tokens a KV head attends to in a layer that is not a dense one."""
        if self.request is None:
            return self.seq_len
        return min(self.live_len, self.full_prefix_len + self.request.budget)


@dataclass
class RequestState:
    """FASA's bookkeeping of one running request; lives on SGLang's ``Req``.

    Args:
        request: What it asked for; None if it stays dense.
        num_layers: Layers of the model.
        num_dense_layers: How many of them attend to everything.
        usage: Where its steps are counted for the whole server.
        prune: What it has lost.
        exact_len: Leading tokens whose keys and values are those of a dense run; None is all.
            A token decoded sparsely has others from the second sparse layer on.
    """

    request: FasaRequest | None
    num_layers: int
    num_dense_layers: int
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
        sparse_layers = self.num_layers - self.num_dense_layers
        rows = self.num_dense_layers * lane.live_len + sparse_layers * lane.attended_len
        self.attended_rows += rows
        self.all_rows += self.num_layers * lane.seq_len
        self.usage.add_step(lane.request is not None, rows, self.num_layers * lane.seq_len)

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


def request_state(req: Any, config: FasaConfig, num_layers: int, usage: Usage) -> RequestState:
    """The state of an SGLang ``Req``, made when the request is first scheduled."""
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None:
        asked = req.sampling_params.custom_params
        state = RequestState(
            request=parse_request(asked, config, len(req.origin_input_ids)),
            num_layers=num_layers,
            num_dense_layers=min(config.num_dense_layers, num_layers),
            usage=usage,
        )
        setattr(req, REQ_ATTRIBUTE, state)
    return state


def launch_step(batch: Any, config: FasaConfig, num_layers: int, usage: Usage) -> list[LaneStep]:
    """Decide what every lane of a ``ScheduleBatch`` does now, and note it for its reply.

    Returns:
        One entry per request of a decode batch; empty for every other batch.
    """
    states = [request_state(req, config, num_layers, usage) for req in batch.reqs]
    if not batch.forward_mode.is_decode():
        # A prefill, first or after a retraction: what was in flight before it never finished.
        for state in states:
            state.launched.clear()
            state.launched.append(None)
            state.exact_len = None
            state.prune.pruned = 0
        return []
    lanes = []
    for req, state, seq_len in zip(batch.reqs, states, batch.seq_lens_cpu.tolist(), strict=True):
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
    return lanes
