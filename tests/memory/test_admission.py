"""Replies longer than the pool, and many requests where few would fit whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasa_sglang.workloads.engine import running_engine
from serving import generate

POOL, KEPT, NEW_TOKENS = 400, 40, 600
PRUNE = {"budget": 30, "sink": 2, "recent": 4, "prune": "generated", "prune_budget": KEPT}


def test_a_pruned_reply_may_be_longer_than_the_pool(
    random_model: Path, random_calibration: str
) -> None:
    """And five of them run at once, each of which SGLang would give most of the pool."""
    settings: dict[str, Any] = {"calibration": random_calibration, "min_seq_len": 0}
    settings |= {"prune_interval": 8, "prune_recent": 8, "prune_grace": 4}
    settings["prune_admission"] = True
    prompts = [list(range(300 + i, 310 + i)) for i in range(6)]
    with running_engine(
        random_model, settings, skip_tokenizer_init=True, max_total_tokens=POOL
    ) as engine:
        replies = generate(engine, prompts, [PRUNE] * 5 + [None], NEW_TOKENS, ignore_eos=True)
        [after] = generate(engine, [[5] * (POOL - 50)], [None], 4, ignore_eos=True)
    assert after["meta_info"]["completion_tokens"] == 4
    lengths = [reply["meta_info"]["completion_tokens"] for reply in replies]
    assert lengths[:5] == [NEW_TOKENS] * 5
    # Whole, a request is clipped to the pool.
    assert POOL - 20 <= lengths[5] < POOL
    for reply in replies[:5]:
        assert reply["meta_info"].get("num_retractions", 0) == 0
        assert reply["meta_info"]["fasa"]["pruned_tokens"] >= NEW_TOKENS - KEPT - 10
