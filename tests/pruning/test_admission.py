"""Replies longer than the pool, and requests that only fit together because they prune."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.workloads.serving.engine import running_engine
from fasa_sglang.workloads.serving.greedy import generate

POOL, KEPT, NEW_TOKENS = 400, 40, 600
PRUNE = {"budget": 30, "sink": 2, "recent": 4, "prune": "generated", "prune_budget": KEPT}


@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no-radix"])
def test_pruned_replies_longer_than_the_pool_run_at_once_and_finish(
    random_model: Path, random_calibration: str, radix: bool
) -> None:
    """By SGLang's reservation each of the five requests would need most of the pool.

    Without a radix cache SGLang has another rule for requests that ignore EOS, by which they would
    wait for each other.
    """
    settings: dict[str, Any] = {
        "calibration": random_calibration,
        "min_seq_len": 0,
        "prune_interval": 8,
        "prune_recent": 8,
        "prune_grace": 4,
        "prune_admission": True,
    }
    prompts = [list(range(300 + i, 310 + i)) for i in range(6)]
    with running_engine(
        random_model,
        settings,
        skip_tokenizer_init=True,
        max_total_tokens=POOL,
        disable_radix_cache=not radix,
    ) as engine:

        async def stream(prompt: list[int]) -> tuple[float, float, dict[str, Any]]:
            """Times of the first and last message, and the last message."""
            params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
            messages = await engine.async_generate(
                input_ids=prompt,
                sampling_params={**params, "custom_params": {"fasa": PRUNE}},
                stream=True,
            )
            received = [(time.perf_counter(), message) async for message in messages]
            return received[0][0], received[-1][0], received[-1][1]

        async def stream_all() -> list[tuple[float, float, dict[str, Any]]]:
            return await asyncio.gather(*(stream(prompt) for prompt in prompts[:5]))

        runs = engine.loop.run_until_complete(stream_all())
        [unpruned] = generate(engine, prompts[5:], [None], NEW_TOKENS, ignore_eos=True)
        [after] = generate(engine, [[5] * (POOL - 50)], [None], 4, ignore_eos=True)
    assert max(first for first, _, _ in runs) < min(last for _, last, _ in runs)
    assert after["meta_info"]["completion_tokens"] == 4
    # SGLang clips a request that does not prune to the pool.
    assert POOL - 20 <= unpruned["meta_info"]["completion_tokens"] < POOL
    for _, _, reply in runs:
        assert reply["meta_info"]["completion_tokens"] == NEW_TOKENS
        assert reply["meta_info"].get("num_retractions", 0) == 0
        assert reply["meta_info"]["fasa"]["pruned_tokens"] >= NEW_TOKENS - KEPT - 10
