"""What pruning takes from a conversation, and what the prefix cache keeps of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from fasa_sglang.workloads.serving.forced import forced_request
from fasa_sglang.workloads.serving.greedy import divergence, generate

SPARSE = {"budget": 40, "sink": 2, "recent": 4}
KEPT, INTERVAL = 30, 8
PRUNE = {**SPARSE, "prune": "generated", "prune_budget": KEPT}
THINK_END = 8191


@pytest.fixture(scope="module")
def engine(random_model: Path, random_calibration: str) -> Iterator[Any]:
    settings = {
        "calibration": random_calibration,
        "min_seq_len": 0,
        "prune_interval": INTERVAL,
        "prune_recent": 8,
        "prune_grace": 4,
        "think_end_ids": [THINK_END],
    }
    with running_engine(
        random_model, settings, skip_tokenizer_init=True, enable_custom_logit_processor=True
    ) as running:
        yield running


def test_follow_up_of_a_pruned_reply_equals_a_cold_dense_run(engine: Any) -> None:
    """Only intact keys are cached: the prompt and what precedes the first sparse step."""
    prompt = list(range(200, 300))
    [pruned] = generate(engine, [prompt], [PRUNE], 150, ignore_eos=True)
    report = pruned["meta_info"]["fasa"]
    # The keys of the last token are never computed.
    assert 149 - KEPT - INTERVAL <= report["pruned_tokens"] <= 149 - KEPT
    assert report["kv_read_ratio"] < 0.6
    follow_up = [*prompt, *pruned["output_ids"], 7, 8, 9]
    [warm] = generate(engine, [follow_up], [False], 20, ignore_eos=True)
    assert len(prompt) - 1 <= warm["meta_info"]["cached_tokens"] <= len(prompt) + 1
    flush_cache(engine)
    [cold] = generate(engine, [follow_up], [False], 20, return_logprob=True, ignore_eos=True)
    problem = divergence(cold, warm)
    assert problem is None, problem
    # The reply does not depend on which slots it gets. GPU kernels break ties in no fixed order.
    if not torch.cuda.is_available():
        flush_cache(engine)
        [repeated] = generate(engine, [prompt], [PRUNE], 150, ignore_eos=True)
        assert repeated["output_ids"] == pruned["output_ids"]
    # Without pruning, the tokens that it took would have been read.
    [unpruned] = generate(engine, [prompt], [SPARSE], 150, ignore_eos=True)
    assert unpruned["meta_info"]["fasa"]["pruned_tokens"] == 0
    assert unpruned["output_ids"] != pruned["output_ids"]


def test_prune_think_takes_tokens_before_the_end_of_thinking_only(engine: Any) -> None:
    generator = random.Random(0)
    thinking_lens = [60, 20, None]
    replies = []
    for thinking_len in thinking_lens:
        replies.append([generator.randrange(100, 8000) for _ in range(150)])
        if thinking_len is not None:
            replies[-1][thinking_len] = THINK_END

    async def send_all() -> list[dict[str, Any]]:
        requests = (
            engine.async_generate(
                input_ids=list(range(300 + i, 360 + i)),
                **forced_request(reply, {"fasa": {**PRUNE, "prune": "think"}}),
            )
            for i, reply in enumerate(replies)
        )
        return await asyncio.gather(*requests)

    got = engine.loop.run_until_complete(send_all())
    assert [reply["output_ids"] for reply in got] == replies
    pruned = [reply["meta_info"]["fasa"]["pruned_tokens"] for reply in got]
    assert 60 - KEPT - INTERVAL < pruned[0] <= 60 - KEPT
    assert pruned[1] == 0, "the thinking did not exceed the budget"
    assert pruned[2] >= 149 - KEPT - INTERVAL, "thinking that does not end is pruned throughout"
