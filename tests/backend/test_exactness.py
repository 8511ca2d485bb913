"""Requests that do not use FASA, or whose budget covers them, get SGLang's own answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fasa_sglang.calibration import corpus
from fasa_sglang.workloads.serving.engine import running_engine
from serving import divergence, generate

SERVER = {"chunked_prefill_size": 512, "max_total_tokens": 40000}


def mixed_prompts(tokenizer: Any, count: int, longest: int) -> list[list[int]]:
    """Prompts of 10 to ``longest`` tokens, evenly spread on a log scale; half share prefixes."""
    prose = tokenizer(corpus.default_text().content[:200_000]).input_ids
    code = tokenizer(corpus.held_out_text().content).input_ids
    ratio = (longest / 10) ** (1 / (count - 1))
    lengths = [round(10 * ratio**i) for i in range(count)]
    prompts = []
    for i, length in enumerate(lengths):
        # Even prompts all begin alike and end differently; odd ones have nothing in common.
        own = prose[1000 * i :]
        prompts.append((code[: length // 2] + own if i % 2 == 0 else own)[:length])
    return prompts


@pytest.mark.slow
def test_off_and_covering_budgets_equal_torch_native(
    smollm2_path: Path, smollm2_calibration: str, draw: Callable[[Any, Any], Any]
) -> None:
    """One batch: every prompt off, on with a budget over its length, and on with a small one."""
    count, longest, max_new_tokens = draw((6, 600, 8), (24, 4000, 16))
    prompts = mixed_prompts(AutoTokenizer.from_pretrained(smollm2_path), count, longest)
    with running_engine(smollm2_path, None, **SERVER) as engine:
        none = [None] * count
        expected = generate(engine, prompts, none, max_new_tokens, return_logprob=True)
    asked: list[Any] = [None, False, {"budget": 8192}, {"budget": 8192, "prefix": "full"}]
    asked += [{"budget": 64}, {"budget": 100, "sink": 0, "recent": 8}]
    # Every prompt off, covered and sparse; which variant of each goes round.
    requests = [(i, asked[2 * kind + (i + kind) % 2]) for i in range(count) for kind in range(3)]
    random.Random(0).shuffle(requests)
    settings = {"calibration": smollm2_calibration, "min_seq_len": 0, "max_budget": 8192}
    with running_engine(smollm2_path, settings, **SERVER) as engine:
        got = generate(
            engine,
            [prompts[i] for i, _ in requests],
            [fasa for _, fasa in requests],
            max_new_tokens,
        )
    problems = []
    sparse_differs = 0
    for (i, fasa), reply in zip(requests, got, strict=True):
        report = reply["meta_info"]["fasa"]
        steps = reply["meta_info"]["completion_tokens"] - 1
        assert report["sparse_steps"] == (steps if fasa else 0), (fasa, report)
        assert report["dense_steps"] == (0 if fasa else steps), (fasa, report)
        if fasa and fasa["budget"] < len(prompts[i]):
            assert report["kv_read_ratio"] < 1
            sparse_differs += reply["output_ids"] != expected[i]["output_ids"]
            continue
        assert report["kv_read_ratio"] == 1
        problem = divergence(expected[i], reply)
        if problem:
            problems.append(f"fasa={fasa}: {problem}")
    assert not problems, "\n".join(problems)
    # The small budgets do something, so that the equalities above are not idle.
    assert sparse_differs > 0
