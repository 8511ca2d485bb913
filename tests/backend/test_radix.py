"""Label cache, KV and radix tree stay one thing, whatever requests share slots."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from serving import divergence, generate

FASA = [None, {"budget": 40}, {"budget": 60, "sink": 0}, {"budget": 40, "prefix": "full"}, True]


@pytest.fixture(scope="module")
def engine(tiny_path: Path, tiny_calibration: str) -> Iterator[Any]:
    # With a dense first layer the second one's keys would be exact, however sparse the decode.
    settings = {
        "calibration": tiny_calibration,
        "min_seq_len": 0,
        "budget": 48,
        "num_dense_layers": 0,
    }
    with running_engine(
        tiny_path, settings, max_total_tokens=6000, chunked_prefill_size=256
    ) as running:
        yield running


def conversation(generator: random.Random, system_prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of each turn; the first begins with a system prompt that others share."""
    turns = [
        [generator.randrange(3, 49152) for _ in range(generator.randint(5, 60))] for _ in "abcd"
    ]
    turns[0] = generator.choice(system_prompts) + turns[0]
    return turns[: generator.randint(2, 4)]


@pytest.mark.slow
def test_replies_do_not_depend_on_the_prefix_cache(
    engine: Any, draw: Callable[[Any, Any], Any]
) -> None:
    """Multi-turn conversations, dense and sparse turns mixed, a few at a time over one tree.

    Each request is repeated alone with the tree flushed. History holds the replies themselves: a
    follow-up turn must not see a trace of how an earlier reply was computed.
    """
    generator = random.Random(0)
    system_prompts = [
        [generator.randrange(3, 49152) for _ in range(length)] for length in (30, 120, 300)
    ]
    conversations = [conversation(generator, system_prompts) for _ in range(draw(10, 50))]
    sent: list[tuple[list[int], Any, dict[str, Any]]] = []
    for start in range(0, len(conversations), 5):
        group = conversations[start : start + 5]
        histories: list[list[int]] = [[] for _ in group]
        for turn in range(4):
            live = [i for i, turns in enumerate(group) if turn < len(turns)]
            asked = [generator.choice(FASA) for _ in live]
            for i in live:
                histories[i] = histories[i] + group[i][turn]
            if not live:
                break
            replies = generate(engine, [histories[i] for i in live], asked, 12)
            for i, fasa, reply in zip(live, asked, replies, strict=True):
                sent.append((histories[i], fasa, reply))
                histories[i] = histories[i] + reply["output_ids"]
    cached = sum(reply["meta_info"]["cached_tokens"] for _, _, reply in sent)
    assert cached > 10 * len(sent)
    problems = []
    for prompt, fasa, warm in sent:
        flush_cache(engine)
        [cold] = generate(engine, [prompt], [fasa], 12, return_logprob=True)
        assert cold["meta_info"]["cached_tokens"] == 0
        assert warm["meta_info"]["fasa"] == cold["meta_info"]["fasa"]
        problem = divergence(cold, warm)
        if problem:
            problems.append(f"fasa={fasa}: {problem}")
    assert not problems, "\n".join(problems)


def test_sparse_replies_stay_out_of_the_tree_and_dense_ones_enter(engine: Any) -> None:
    """What a sparse step computed is that request's approximation; another request that read it
    from the tree, a dense one even, would silently inherit it."""
    prompt = list(range(100, 300))
    for fasa, kept in ((None, True), ({"budget": 40}, False), ({"budget": 4096}, True)):
        flush_cache(engine)
        [first] = generate(engine, [prompt], [fasa], 10)
        follow_up = prompt + first["output_ids"] + [7]
        [second] = generate(engine, [follow_up], [None], 2)
        cached = second["meta_info"]["cached_tokens"]
        assert cached >= len(prompt) + 8 if kept else cached == len(prompt)


def test_pool_is_whole_after_sparse_requests_finish_and_abort(engine: Any) -> None:
    """Withheld slots are freed exactly once: SGLang's own idle check would kill the server."""
    prompts = [[1000 + i, *list(range(10, 80))] for i in range(8)]
    for length in (1, 2, 30):
        generate(engine, prompts, [{"budget": 40}] * 8, length)
    stream = engine.generate(
        input_ids=prompts[0],
        sampling_params={"max_new_tokens": 200, "custom_params": {"fasa": {"budget": 40}}},
        stream=True,
    )
    next(stream)
    engine.tokenizer_manager.abort_request(abort_all=True)
    for _ in stream:
        pass
    flush_cache(engine)
    [reply] = generate(engine, [prompts[0]], [None], 4)
    assert reply["meta_info"]["cached_tokens"] == 0
