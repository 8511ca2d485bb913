"""Prefix cache, sessions and batches: a reply depends on its own request only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from fasa_sglang.workloads.serving.greedy import divergence, generate

FASA: list[Any] = [
    None,
    False,
    True,
    {"budget": 40},
    {"budget": 60, "sink": 0},
    {"budget": 40, "prefix": "full"},
]


@pytest.fixture(scope="module")
def engine(tiny_path: Path, tiny_calibration: str) -> Iterator[Any]:
    # With a dense first layer, a sparse decode would leave exact keys in the second and last one.
    settings = {
        "calibration": tiny_calibration,
        "min_seq_len": 0,
        "budget": 48,
        "num_dense_layers": 0,
    }
    with running_engine(
        tiny_path,
        settings,
        max_total_tokens=16000,
        chunked_prefill_size=256,
        max_running_requests=24,
    ) as running:
        yield running


def random_tokens(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(3, 49152) for _ in range(count)]


def conversation(generator: random.Random, system_prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of two to four turns; the first begins with a shared system prompt."""
    turns = [random_tokens(generator, generator.randint(5, 60)) for _ in range(4)]
    turns[0] = generator.choice(system_prompts) + turns[0]
    return turns[: generator.randint(2, 4)]


def reply_alone(engine: Any, prompt: list[int], fasa: Any) -> dict[str, Any]:
    """The reply to a request that runs by itself over an empty prefix cache."""
    flush_cache(engine)
    [reply] = generate(engine, [prompt], [fasa], 12, return_logprob=True)
    assert reply["meta_info"]["cached_tokens"] == 0
    return reply


def check_against_alone(engine: Any, sent: list[tuple[list[int], Any, dict[str, Any]]]) -> None:
    """Compare replies, as (prompt, ``fasa``, reply), with those that the requests get alone."""
    problems = []
    for prompt, fasa, reply in sent:
        alone = reply_alone(engine, prompt, fasa)
        assert reply["meta_info"]["fasa"] == alone["meta_info"]["fasa"]
        problem = divergence(alone, reply)
        if problem:
            problems.append(f"fasa={fasa}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_replies_over_a_warm_prefix_cache_equal_cold_ones(
    engine: Any, draw: Callable[[Any, Any], Any]
) -> None:
    """Conversations with dense and sparse turns, five at a time over one radix tree.

    The history holds the replies: a follow-up must not notice how an earlier one was computed.
    """
    generator = random.Random(0)
    system_prompts = [random_tokens(generator, length) for length in (30, 120, 300)]
    conversations = [conversation(generator, system_prompts) for _ in range(draw(10, 50))]
    sent: list[tuple[list[int], Any, dict[str, Any]]] = []
    for start in range(0, len(conversations), 5):
        group = conversations[start : start + 5]
        histories: list[list[int]] = [[] for _ in group]
        for turn in range(4):
            live = [i for i, turns in enumerate(group) if turn < len(turns)]
            if not live:
                break
            requests = [generator.choice(FASA) for _ in live]
            for i in live:
                histories[i] = histories[i] + group[i][turn]
            replies = generate(engine, [histories[i] for i in live], requests, 12)
            for i, fasa, reply in zip(live, requests, replies, strict=True):
                sent.append((histories[i], fasa, reply))
                histories[i] = histories[i] + reply["output_ids"]
    cached = sum(reply["meta_info"]["cached_tokens"] for _, _, reply in sent)
    assert cached > 10 * len(sent)
    check_against_alone(engine, sent)


@pytest.mark.slow
def test_replies_from_a_mixed_batch_equal_those_of_lone_requests(
    engine: Any, draw: Callable[[Any, Any], Any]
) -> None:
    generator = random.Random(1)
    shared = random_tokens(generator, 150)
    prompts = [
        shared[: generator.choice((0, 60, 150))]
        + random_tokens(generator, generator.randint(1, 120))
        for _ in range(draw(24, 200))
    ]
    requests = [generator.choice(FASA) for _ in prompts]
    replies = generate(engine, prompts, requests, 12)
    check_against_alone(engine, list(zip(prompts, requests, replies, strict=True)))


def test_radix_tree_after_a_reply_holds_what_was_decoded_densely(engine: Any) -> None:
    """Another request that reads a sparse reply from the tree would inherit its approximation."""
    prompt = list(range(100, 300))
    for fasa, enters in ((None, True), ({"budget": 40}, False), ({"budget": 4096}, True)):
        flush_cache(engine)
        [first] = generate(engine, [prompt], [fasa], 10)
        follow_up = prompt + first["output_ids"] + [7]
        [second] = generate(engine, [follow_up], [None], 2)
        cached = second["meta_info"]["cached_tokens"]
        assert cached >= len(prompt) + 8 if enters else cached == len(prompt)


@pytest.mark.parametrize("fasa", [None, {"budget": 40}], ids=["dense", "sparse"])
def test_session_second_turn_equals_a_cold_run(engine: Any, fasa: Any) -> None:
    """A session without streaming keeps tokens only; keys go through the radix tree."""
    flush_cache(engine)
    prompt, new = list(range(500, 640)), [7, 8, 9]
    session = engine.open_session(capacity_of_str_len=10_000)

    def turn(input_ids: list[int], request: Any, **session_params: Any) -> dict[str, Any]:
        params = {"temperature": 0, "max_new_tokens": 12, "custom_params": {"fasa": request}}
        return engine.generate(
            input_ids=input_ids,
            sampling_params=params,
            session_params={"id": session, **session_params},
        )

    first = turn(prompt, {"budget": 40})
    assert first["meta_info"]["fasa"]["sparse_steps"] == 11
    second = turn(new, fasa, rid=first["meta_info"]["id"])
    engine.close_session(session)
    cached = second["meta_info"]["cached_tokens"]
    assert len(prompt) - 1 <= cached <= len(prompt)
    cold = reply_alone(engine, [*prompt, *first["output_ids"], *new], fasa)
    assert second["meta_info"]["prompt_tokens"] == cold["meta_info"]["prompt_tokens"]
    problem = divergence(cold, second)
    assert problem is None, problem


def test_pool_after_sparse_requests_finish_and_abort_is_whole(engine: Any) -> None:
    """SGLang's leak check would end the server if a withheld slot were lost or freed twice."""
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
    assert reply_alone(engine, prompts[0], None)["meta_info"]["completion_tokens"] == 12
