"""Ranks that hold different heads prune different tokens, as many and from the same place on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from serving import divergence, generate

KEPT, NEW_TOKENS = 40, 80
PRUNE = {"budget": 30, "sink": 2, "recent": 4, "prune": "generated", "prune_budget": KEPT}
ASKED: list[Any] = [PRUNE, {**PRUNE, "prefix": "full"}, None, True]
PROMPTS = [list(range(300 + i, 340 + i)) for i in range(len(ASKED))]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
def test_two_ranks_answer_as_one(
    random_model: Path, random_calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By age all ranks prune the same tokens, and by importance each its own."""
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
            made = generate(
                engine, PROMPTS, ASKED, NEW_TOKENS, return_logprob=True, ignore_eos=True
            )
            if tp_size == 2:
                _follow_up(engine, made)
        return made

    alone = replies("oldest", 1)
    by_age, by_importance = replies("oldest", 2), replies("fasa", 2)
    pruned = [reply["meta_info"]["fasa"]["pruned_tokens"] for reply in alone]
    assert min(pruned[:2]) > NEW_TOKENS - KEPT - 10 and pruned[2:] == [0, 0]
    for got in (by_age, by_importance):
        assert [reply["meta_info"]["fasa"]["pruned_tokens"] for reply in got] == pruned
    problems = [divergence(*pair) for pair in zip(alone, by_age, strict=True)]
    problems += [divergence(alone[i], by_importance[i]) for i in (2, 3)]
    assert not any(problems), problems


def _follow_up(engine: Any, replies: list[dict[str, Any]]) -> None:
    """It would hang or answer wrongly if the ranks' radix trees held different prefixes."""
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
