"""Where a request's thinking ends, and what it costs to know."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from fasa_sglang.backend.thinking import thinking_end
from fasa_sglang.config import FasaConfig
from fasa_sglang.names import REQ_ATTRIBUTE
from fasa_sglang.pruning.state import PruneState

END = 77
CONFIG = FasaConfig(think_end_ids=(END, 78))


class Reply(list[int]):
    """Counts the tokens that are read from it."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        self.reads += len(item) if isinstance(index, slice) else 1
        return item

    def __iter__(self) -> Any:
        for token in super().__iter__():
            self.reads += 1
            yield token


def request(output_ids: Any, scheduled: bool = True, thinks: bool = False) -> Req:
    """A request with a prompt of 10 tokens and this reply so far."""
    params = SamplingParams(max_new_tokens=100)
    req = Req("rid", "", array("q", [5] * 10), params, require_reasoning=thinks)
    req.output_ids = output_ids
    if scheduled:
        setattr(req, REQ_ATTRIBUTE, SimpleNamespace(prune=PruneState()))
    return req


def test_thinking_end_over_a_long_reply_reads_every_token_once() -> None:
    reply = Reply()
    req = request(reply)
    for step in range(20_000):
        reply.append(step % 70)
        # Pruning calls it, and admission calls it again.
        assert thinking_end(req, CONFIG) is None
        assert thinking_end(req, CONFIG) is None
    assert reply.reads == len(reply)
    reply += [END, 3, END]
    assert thinking_end(req, CONFIG) == 10 + 20_000
    reads = reply.reads
    reply.append(END)
    assert thinking_end(req, CONFIG) == 10 + 20_000
    assert reply.reads == reads, "the end is known, so nothing is read any more"


def test_thinking_end_with_token_ids_is_the_position_of_the_first_one() -> None:
    assert thinking_end(request([], scheduled=False), CONFIG) is None
    assert thinking_end(request(array("q", [1, 2, 3])), CONFIG) is None
    # Several tokens may have arrived since the last step.
    req = request(array("q", [1, 2]))
    assert thinking_end(req, CONFIG) is None
    req.output_ids.extend([3, 78, END])
    assert thinking_end(req, CONFIG) == 13


def test_thinking_end_after_a_retraction_follows_the_new_reply() -> None:
    """SGLang keeps the reply of a retracted request, except where the prompt was embeddings."""
    req = request(array("q", [1, 2, 3, END]))
    assert thinking_end(req, CONFIG) == 13
    state = getattr(req, REQ_ATTRIBUTE).prune
    state.restart()
    assert thinking_end(req, CONFIG) == 13
    req.output_ids = array("q")
    state.restart()
    assert thinking_end(req, CONFIG) is None
    req.output_ids.append(END)
    assert thinking_end(req, CONFIG) == 10


def test_thinking_end_without_token_ids_follows_the_reasoning_parser() -> None:
    config = FasaConfig()
    req = request(array("q"), thinks=True)
    for token in (1, 2, 3):
        req.output_ids.append(token)
        req.update_reasoning_tokens(token, [END])
        assert thinking_end(req, config) is None
    req.output_ids.append(END)
    req.update_reasoning_tokens(END, [END])
    assert thinking_end(req, config) == 14
    # A request that does not think has no thinking to prune.
    assert thinking_end(request(array("q", [1] * 9)), config) == 10
