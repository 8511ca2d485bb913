"""Ranks hold different heads, so they may prune different tokens, but equally many of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from fasa_sglang.workloads.serving.greedy import divergence, generate

KEPT, NEW_TOKENS = 40, 80
PRUNE = {"budget": 30, "sink": 2, "recent": 4, "prune": "generated", "prune_budget": KEPT}
REQUESTS: list[Any] = [PRUNE, {**PRUNE, "prefix": "full"}, None, True]
PROMPTS = [list(range(300 + i, 340 + i)) for i in range(len(REQUESTS))]


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
def test_pruning_on_two_ranks_equals_one_rank(
    random_model: Path,
    random_calibration: str,
    draw: Callable[[Any, Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By importance, each rank prunes tokens of its own; by age, all ranks prune the same ones."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    settings: dict[str, Any] = {"calibration": random_calibration, "min_seq_len": 0}
    settings |= {"prune_interval": 8, "prune_recent": 8, "prune_grace": 4}

    def replies(rule: str, tp_size: int) -> list[dict[str, Any]]:
        with running_engine(
            random_model,
            {**settings, "prune_rule": rule},
            skip_tokenizer_init=True,
            max_total_tokens=2000,
            tp_size=tp_size,
        ) as engine:
            results = generate(
                engine, PROMPTS, REQUESTS, NEW_TOKENS, return_logprob=True, ignore_eos=True
            )
            if tp_size == 2:
                check_follow_up(engine, results)
        return results

    alone = replies("oldest", 1)
    pruned = [reply["meta_info"]["fasa"]["pruned_tokens"] for reply in alone]
    assert min(pruned[:2]) > NEW_TOKENS - KEPT - 10 and pruned[2:] == [0, 0]
    # Which replies must equal those of one rank: where victims differ, pruned ones do not.
    for rule, comparable in draw([("fasa", (2, 3))], [("fasa", (2, 3)), ("oldest", (0, 1, 2, 3))]):
        results = replies(rule, 2)
        assert [reply["meta_info"]["fasa"]["pruned_tokens"] for reply in results] == pruned
        problems = [divergence(alone[i], results[i]) for i in comparable]
        assert not any(problems), problems


def check_follow_up(engine: Any, replies: list[dict[str, Any]]) -> None:
    """Would hang or differ if the radix trees of the ranks held different prefixes."""
    longer = [
        [*prompt, *reply["output_ids"], 7, 8, 9]
        for prompt, reply in zip(PROMPTS, replies, strict=True)
    ]
    warm, cold = [], []
    for runs in (warm, cold):
        runs += generate(engine, longer, [None] * 4, 6, return_logprob=True, ignore_eos=True)
        flush_cache(engine)
    assert min(reply["meta_info"]["cached_tokens"] for reply in warm) >= len(PROMPTS[0]) - 1
    assert max(reply["meta_info"]["cached_tokens"] for reply in cold) < len(PROMPTS[0])
    problems = [divergence(*pair) for pair in zip(cold, warm, strict=True)]
    assert not any(problems), problems
