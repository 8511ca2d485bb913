"""Random requests that prune, through one engine with too little memory for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from serving import divergence, generate

PRUNING: list[Any] = [
    {"budget": 40, "prune": "generated", "prune_budget": 20},
    {"budget": 400, "prune": "generated", "prune_budget": 30},
    {"budget": 30, "prune": "generated", "prune_budget": 24, "prefix": "full"},
    {"budget": 40, "prune": "think", "prune_budget": 20},
]
OTHER: list[Any] = [None, False, True, {"budget": 40}, {"budget": 64, "prefix": "full"}]
SETTINGS = {
    "min_seq_len": 0,
    "budget": 100,
    "sink": 2,
    "recent": 4,
    "prune_interval": 8,
    "prune_recent": 6,
    "prune_grace": 4,
    "think_end_ids": [77],
}
AT_ONCE = 12
LONGEST_REPLY = 160
POOL = 1100


async def send(
    engine: Any, prompt: list[int], fasa: Any, tokens: int, rid: str, abort_after: int | None
) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens}
    if fasa is not None:
        params["custom_params"] = {"fasa": fasa}
    stream = await engine.async_generate(
        input_ids=prompt, sampling_params=params, rid=rid, stream=True
    )
    reply: dict[str, Any] = {}
    async for reply in stream:
        done = reply["meta_info"]["completion_tokens"]
        if abort_after is not None and done >= abort_after:
            engine.tokenizer_manager.abort_request(rid)
    return reply


async def converse(engine: Any, number: int, prefixes: list[list[int]]) -> list[dict[str, Any]]:
    """One request, and in some cases a follow-up over its whole conversation."""
    draw = random.Random(number)
    shared = draw.choice(prefixes)
    prompt = shared[: draw.randint(0, len(shared))]
    prompt = prompt + [draw.randrange(100, 8000) for _ in range(draw.randint(1, 60))]
    turns = []
    for turn in range(draw.choice((1, 1, 2))):
        fasa = draw.choice(PRUNING + OTHER)
        tokens = draw.choice((1, 40, LONGEST_REPLY))
        abort = draw.randint(1, 60) if draw.random() < 0.15 else None
        reply = await send(engine, prompt, fasa, tokens, f"{number}-{turn}", abort)
        ended = reply["meta_info"]["finish_reason"]["type"]
        turns.append({"prompt": prompt, "fasa": fasa, "tokens": tokens, "reply": reply})
        if ended == "abort":
            break
        prompt = prompt + reply["output_ids"] + [draw.randrange(100, 8000) for _ in range(9)]
        prompt = prompt[: POOL // 3]
    return turns


async def converse_all(engine: Any, count: int, prefixes: list[list[int]]) -> list[dict[str, Any]]:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> list[dict[str, Any]]:
        async with slots:
            return await converse(engine, number, prefixes)

    conversations = await asyncio.gather(*(one(number) for number in range(count)))
    return [turn for conversation in conversations for turn in conversation]


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no-radix"])
def test_pruning_leaks_nothing_and_leaves_others_alone(
    random_model: Path,
    random_calibration: str,
    draw: Callable[[Any, Any], Any],
    overlap: bool,
    radix: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Aborts, retractions, shared prefixes, follow-ups over pruned conversations.

    SGLang checks the pool at every step and kills the server if a slot is missing or was given back
    twice. What requests that do not prune or select answer is compared with SGLang's own
    backend, which would show a slot that two requests share.
    """
    if draw(True, False) and overlap != radix:
        pytest.skip("only in full")
    monkeypatch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1")
    generator = random.Random(0)
    prefixes = [[generator.randrange(100, 8000) for _ in range(n)] for n in (20, 90, 200)]
    common = {"skip_tokenizer_init": True, "max_running_requests": AT_ONCE}
    with running_engine(
        random_model,
        {**SETTINGS, "calibration": random_calibration, "prune_admission": radix},
        max_total_tokens=POOL,
        schedule_conservativeness=0.01,
        disable_overlap_schedule=not overlap,
        disable_radix_cache=not radix,
        **common,
    ) as engine:
        turns = engine.loop.run_until_complete(converse_all(engine, draw(40, 900), prefixes))
        flush_cache(engine)
        # The pool is whole: the longest request that fits it still does.
        [last] = generate(engine, [[5] * (POOL - 50)], [None], 4)
        assert last["meta_info"]["completion_tokens"] == 4
    reports = [turn["reply"]["meta_info"].get("fasa") for turn in turns]
    pruned = sum(report["pruned_tokens"] for report in reports if report)
    assert pruned > 100
    for turn, report in zip(turns, reports, strict=True):
        if report and turn["fasa"] in OTHER:
            assert report["pruned_tokens"] == 0
    retracted = sum(turn["reply"]["meta_info"].get("num_retractions", 0) for turn in turns)
    assert retracted > 0, "the pool was large enough for all requests at once"

    off = [
        turn
        for turn in turns
        if turn["fasa"] in (None, False)
        and turn["reply"]["meta_info"]["finish_reason"]["type"] != "abort"
    ]
    with running_engine(random_model, None, max_total_tokens=20000, **common) as engine:
        expected = generate(
            engine,
            [turn["prompt"] for turn in off],
            [None] * len(off),
            LONGEST_REPLY,
            return_logprob=True,
        )
    problems = []
    for turn, dense in zip(off, expected, strict=True):
        dense["output_ids"] = dense["output_ids"][: turn["tokens"]]
        problem = divergence(dense, turn["reply"])
        if problem:
            problems.append(problem)
    assert not problems, "\n".join(problems)
