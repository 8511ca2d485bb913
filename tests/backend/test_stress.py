"""Random requests through engines that have too little memory for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from fasa_sglang.workloads.serving.greedy import divergence, generate

DENSE: list[Any] = [None, False]
SPARSE: list[Any] = [
    True,
    {"budget": 40},
    {"budget": 200, "sink": 0, "recent": 8},
    {"budget": 64, "prefix": "full"},
    {"budget": 4096},
]
PRUNING: list[Any] = [
    {"budget": 40, "prune": "generated", "prune_budget": 20},
    {"budget": 400, "prune": "generated", "prune_budget": 30},
    {"budget": 30, "prune": "generated", "prune_budget": 24, "prefix": "full"},
    {"budget": 40, "prune": "think", "prune_budget": 20},
]
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
MAX_RUNNING = 12
POOL = 1100
COMMON = {"skip_tokenizer_init": True, "max_running_requests": MAX_RUNNING}
# Overlap scheduling, radix cache.
SERVERS = [(True, True), (False, False), (True, False), (False, True)]


@dataclass(frozen=True)
class Traffic:
    """What random conversations are made of.

    Args:
        count: Number of conversations.
        longest_reply: In tokens.
        prunes: Whether some requests prune.
    """

    count: int
    longest_reply: int
    prunes: bool

    @property
    def fasa_choices(self) -> list[Any]:
        return DENSE + SPARSE + (PRUNING if self.prunes else [])


async def send(
    engine: Any, prompt: list[int], fasa: Any, tokens: int, rid: str, abort_after: int | None
) -> dict[str, Any]:
    """The last reply to one request, which is aborted once it has ``abort_after`` tokens."""
    # Without ignore_eos, for which SGLang would reserve whole replies and retract none.
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens}
    if fasa is not None:
        params["custom_params"] = {"fasa": fasa}
    stream = await engine.async_generate(
        input_ids=prompt, sampling_params=params, rid=rid, stream=True
    )
    reply: dict[str, Any] = {}
    async for reply in stream:
        if abort_after is not None and reply["meta_info"]["completion_tokens"] >= abort_after:
            engine.tokenizer_manager.abort_request(rid)
    return reply


async def converse(
    engine: Any, number: int, prefixes: list[list[int]], traffic: Traffic
) -> list[dict[str, Any]]:
    """One request, and for some a follow-up over the whole conversation."""
    generator = random.Random(number)
    shared = generator.choice(prefixes)
    prompt = shared[: generator.randint(0, len(shared))]
    prompt = prompt + [generator.randrange(100, 8000) for _ in range(generator.randint(1, 60))]
    turns = []
    for turn in range(generator.choice((1, 1, 2))):
        fasa = generator.choice(traffic.fasa_choices)
        tokens = generator.choice((1, 40, traffic.longest_reply))
        abort = generator.randint(1, 60) if generator.random() < 0.15 else None
        reply = await send(engine, prompt, fasa, tokens, f"{number}-{turn}", abort)
        turns.append({"prompt": prompt, "fasa": fasa, "tokens": tokens, "reply": reply})
        if is_aborted(reply):
            break
        new = [generator.randrange(100, 8000) for _ in range(9)]
        prompt = [*prompt, *reply["output_ids"], *new][: POOL // 3]
    return turns


async def converse_all(
    engine: Any, prefixes: list[list[int]], traffic: Traffic
) -> list[dict[str, Any]]:
    running = asyncio.Semaphore(MAX_RUNNING)

    async def one(number: int) -> list[dict[str, Any]]:
        async with running:
            return await converse(engine, number, prefixes, traffic)

    conversations = await asyncio.gather(*(one(number) for number in range(traffic.count)))
    return [turn for conversation in conversations for turn in conversation]


def is_aborted(reply: dict[str, Any]) -> bool:
    return reply["meta_info"]["finish_reason"]["type"] == "abort"


def check_turns(turns: list[dict[str, Any]], *, prunes: bool) -> None:
    """Check what the replies report, and that the draw covers pruning, aborts and retractions."""
    pruned = 0
    for turn in turns:
        report = turn["reply"]["meta_info"].get("fasa")
        if report is None:
            continue
        if turn["fasa"] in PRUNING:
            pruned += report["pruned_tokens"]
        else:
            assert report["pruned_tokens"] == 0
        if turn["fasa"] in DENSE:
            assert report["sparse_steps"] == 0
    assert pruned > 100 or not prunes
    aborted = [is_aborted(turn["reply"]) for turn in turns]
    assert any(aborted) and not all(aborted)
    retracted = sum(turn["reply"]["meta_info"].get("num_retractions", 0) for turn in turns)
    assert retracted > 0, "the pool was large enough for all requests at once"


def divergences(model: Path, turns: Iterable[dict[str, Any]], longest_reply: int) -> list[str]:
    """How replies differ from those of SGLang's own backend."""
    turns = list(turns)
    with running_engine(model, None, max_total_tokens=20000, **COMMON) as engine:
        expected = generate(
            engine,
            [turn["prompt"] for turn in turns],
            [None] * len(turns),
            longest_reply,
            return_logprob=True,
        )
    problems = []
    for turn, dense in zip(turns, expected, strict=True):
        dense["output_ids"] = dense["output_ids"][: turn["tokens"]]
        problem = divergence(dense, turn["reply"])
        if problem:
            problems.append(problem)
    return problems


def stress(
    model: Path,
    settings: dict[str, Any],
    servers: Sequence[tuple[bool, bool]],
    traffic: Traffic,
) -> None:
    """Send ``traffic`` to each of ``servers``, and check the pool and dense replies."""
    generator = random.Random(0)
    prefixes = [[generator.randrange(100, 8000) for _ in range(n)] for n in (20, 90, 200)]
    dense_turns: list[dict[str, Any]] = []
    for overlap, radix in servers:
        with running_engine(
            model,
            {**SETTINGS, **settings, "prune_admission": radix},
            max_total_tokens=POOL,
            schedule_conservativeness=0.01,
            disable_overlap_schedule=not overlap,
            disable_radix_cache=not radix,
            **COMMON,
        ) as engine:
            turns = engine.loop.run_until_complete(converse_all(engine, prefixes, traffic))
            flush_cache(engine)
            # The pool is whole: the longest request that fits it still does.
            [last] = generate(engine, [[5] * (POOL - 50)], [None], 4)
            assert last["meta_info"]["completion_tokens"] == 4
        check_turns(turns, prunes=traffic.prunes)
        dense_turns += [
            turn for turn in turns if turn["fasa"] in DENSE and not is_aborted(turn["reply"])
        ]
    problems = divergences(model, dense_turns, traffic.longest_reply)
    assert not problems, "\n".join(problems)


@pytest.fixture(autouse=True)
def strict_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang checks the pool at every step, and ends if a slot is missing or was freed twice."""
    monkeypatch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1")


@pytest.mark.slow
def test_random_requests_under_memory_pressure_leak_no_slot_and_leave_dense_replies_exact(
    random_model: Path, random_calibration: str, draw: Callable[[Any, Any], Any]
) -> None:
    """Aborts, retractions, shared prefixes, follow-ups over sparse and pruned conversations.

    A slot that two requests share would change a dense reply.
    """
    count = draw(40, 900 if not torch.cuda.is_available() else 2000)
    traffic = Traffic(count, longest_reply=160, prunes=True)
    stress(random_model, {"calibration": random_calibration}, SERVERS[: draw(2, 4)], traffic)


@pytest.mark.thorough
def test_random_requests_to_gemma_leak_no_slot_and_leave_dense_replies_exact(
    gemma_path: Path,
) -> None:
    """The same with sliding windows in 15 of 18 layers, which keep requests from pruning."""
    stress(gemma_path, {}, SERVERS[:1], Traffic(200, longest_reply=60, prunes=False))
