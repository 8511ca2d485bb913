"""Hundreds of random requests through one engine that has too little memory for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from serving import divergence, generate

FASA: list[Any] = [None, False, True, {"budget": 40}, {"budget": 200, "sink": 0, "recent": 8}]
FASA += [{"budget": 64, "prefix": "full"}, {"budget": 4096}]
AT_ONCE = 12
LONGEST_REPLY = 120
POOL = 900


def draw_request(generator: random.Random, prefixes: list[list[int]]) -> dict[str, Any]:
    own = [generator.randrange(3, 8000) for _ in range(generator.randint(1, 80))]
    shared = generator.choice(prefixes)
    return {
        "prompt": shared[: generator.randint(0, len(shared))] + own,
        "fasa": generator.choice(FASA),
        "max_new_tokens": generator.choice((1, 5, 60, LONGEST_REPLY)),
        "abort_after": generator.randint(1, 10) if generator.random() < 0.1 else None,
    }


async def send(engine: Any, request: dict[str, Any], rid: str) -> dict[str, Any]:
    """One request, aborted after some tokens if it says so; returns its last reply."""
    # Not ignore_eos: SGLang would reserve a request's whole reply, and retract none.
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": request["max_new_tokens"]}
    if request["fasa"] is not None:
        params["custom_params"] = {"fasa": request["fasa"]}
    stream = await engine.async_generate(
        input_ids=request["prompt"], sampling_params=params, rid=rid, stream=True
    )
    reply = {}
    async for reply in stream:
        tokens = reply["meta_info"]["completion_tokens"]
        if request["abort_after"] is not None and tokens >= request["abort_after"]:
            engine.tokenizer_manager.abort_request(rid)
    return reply


async def send_all(engine: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(i: int) -> dict[str, Any]:
        async with slots:
            return await send(engine, requests[i], f"request-{i}")

    return await asyncio.gather(*(one(i) for i in range(len(requests))))


@pytest.mark.slow
def test_random_requests_leak_nothing_and_leave_dense_ones_alone(
    random_model: Path, random_calibration: str, draw: Callable[[Any, Any], Any]
) -> None:
    """On, off, budgets, shared prefixes, aborts and retractions, overlap scheduling on.

    SGLang checks the pool whenever it is idle and kills the server if a slot is missing. What
    requests that are off answer is compared with SGLang's own backend.
    """
    generator = random.Random(0)
    prefixes = [[generator.randrange(3, 8000) for _ in range(length)] for length in (30, 100, 300)]
    requests = [
        draw_request(generator, prefixes)
        for _ in range(draw(60, 2000 if torch.cuda.is_available() else 300))
    ]
    settings = {"calibration": random_calibration, "min_seq_len": 0, "budget": 100}
    common = {"skip_tokenizer_init": True, "max_running_requests": AT_ONCE}
    with running_engine(
        random_model,
        settings,
        max_total_tokens=POOL,
        schedule_conservativeness=0.01,
        **common,
    ) as engine:
        replies = engine.loop.run_until_complete(send_all(engine, requests))
        flush_cache(engine)
        # The pool is whole: the longest request that fits it still does.
        [last] = generate(engine, [[5] * (POOL - 50)], [None], 4)
        assert last["meta_info"]["completion_tokens"] == 4
    aborted = [reply["meta_info"]["finish_reason"]["type"] == "abort" for reply in replies]
    assert any(aborted) and not all(aborted)
    retracted = sum(reply["meta_info"].get("num_retractions", 0) for reply in replies)
    assert retracted > 0, "the pool was large enough for all requests at once"

    off = [
        (request, reply)
        for request, reply, gone in zip(requests, replies, aborted, strict=True)
        if request["fasa"] in (None, False) and not gone
    ]
    with running_engine(random_model, None, max_total_tokens=20000, **common) as engine:
        expected = generate(
            engine,
            [request["prompt"] for request, _ in off],
            [None] * len(off),
            LONGEST_REPLY,
            return_logprob=True,
        )
    problems = []
    for (request, reply), dense in zip(off, expected, strict=True):
        dense["output_ids"] = dense["output_ids"][: request["max_new_tokens"]]
        assert reply["meta_info"]["fasa"]["sparse_steps"] == 0
        problem = divergence(dense, reply)
        if problem:
            problems.append(problem)
    assert not problems, "\n".join(problems)
