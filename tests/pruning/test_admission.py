"""Replies longer than the pool, and many requests where few would fit whole."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.workloads.serving.engine import running_engine
from serving import generate

POOL, KEPT, NEW_TOKENS = 400, 40, 600
PRUNE = {"budget": 30, "sink": 2, "recent": 4, "prune": "generated", "prune_budget": KEPT}


@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
def test_a_pruned_reply_may_be_longer_than_the_pool(
    random_model: Path, random_calibration: str, radix: bool
) -> None:
    """And five of them run at once, each of which SGLang would give most of the pool.

    Without a radix cache requests that ignore EOS used to wait for each other all the same.
    """
    settings: dict[str, Any] = {"calibration": random_calibration, "min_seq_len": 0}
    settings |= {"prune_interval": 8, "prune_recent": 8, "prune_grace": 4}
    settings["prune_admission"] = True
    prompts = [list(range(300 + i, 310 + i)) for i in range(6)]
    with running_engine(
        random_model,
        settings,
        skip_tokenizer_init=True,
        max_total_tokens=POOL,
        disable_radix_cache=not radix,
    ) as engine:

        async def streamed(prompt: list[int]) -> tuple[float, float, dict[str, Any]]:
            params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
            stream = await engine.async_generate(
                input_ids=prompt,
                sampling_params={**params, "custom_params": {"fasa": PRUNE}},
                stream=True,
            )
            pieces = [(time.perf_counter(), piece) async for piece in stream]
            return pieces[0][0], pieces[-1][0], pieces[-1][1]

        async def together() -> list[tuple[float, float, dict[str, Any]]]:
            return await asyncio.gather(*(streamed(prompt) for prompt in prompts[:5]))

        runs = engine.loop.run_until_complete(together())
        [whole] = generate(engine, prompts[5:], [None], NEW_TOKENS, ignore_eos=True)
        [after] = generate(engine, [[5] * (POOL - 50)], [None], 4, ignore_eos=True)
    assert max(first for first, _, _ in runs) < min(last for _, last, _ in runs)
    assert after["meta_info"]["completion_tokens"] == 4
    # Whole, a request is clipped to the pool.
    assert POOL - 20 <= whole["meta_info"]["completion_tokens"] < POOL
    for _, _, reply in runs:
        assert reply["meta_info"]["completion_tokens"] == NEW_TOKENS
        assert reply["meta_info"].get("num_retractions", 0) == 0
        assert reply["meta_info"]["fasa"]["pruned_tokens"] >= NEW_TOKENS - KEPT - 10
