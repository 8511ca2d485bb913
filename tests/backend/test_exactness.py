"""Requests that do not use FASA, or whose budget covers them, get SGLang's own answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fasa_sglang.calibration import corpus
from fasa_sglang.workloads.serving.engine import running_engine
from fasa_sglang.workloads.serving.greedy import divergence, generate

SERVER = {"chunked_prefill_size": 512, "max_total_tokens": 40000}
SETTINGS = {"min_seq_len": 0, "max_budget": 8192}
SETTINGS |= {"prune_interval": 8, "prune_recent": 8, "prune_grace": 4}
SPARSE = {"budget": 40, "sink": 2, "recent": 4}
PRUNING = {**SPARSE, "prune": "generated", "prune_budget": 16}
# SGLang 0.5.17 has no beam search.
BEAMS = find_spec("sglang.srt.beam_search") is not None
BEAM_TOKENS = 20


def mixed_prompts(tokenizer: Any, count: int, longest: int) -> list[list[int]]:
    """Prompts of 10 to ``longest`` tokens, evenly spread on a log scale; half share prefixes."""
    prose = tokenizer(corpus.default_text().content[:200_000]).input_ids
    code = tokenizer(corpus.held_out_text().content).input_ids
    ratio = (longest / 10) ** (1 / (count - 1))
    lengths = [round(10 * ratio**i) for i in range(count)]
    prompts = []
    for i, length in enumerate(lengths):
        # Even prompts begin alike and end differently; odd ones have nothing in common.
        own = prose[1000 * i :]
        prompts.append((code[: length // 2] + own if i % 2 == 0 else own)[:length])
    return prompts


def beams(
    engine: Any, prompts: Sequence[list[int]], others: Sequence[tuple[list[int], Any]] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Replies to beam searches and, from the same batches, to greedy requests that outlast them."""

    def send(prompt: list[int], **params: Any) -> Any:
        return engine.async_generate(input_ids=prompt, sampling_params=params)

    async def send_all() -> list[dict[str, Any]]:
        greedy = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 4 * BEAM_TOKENS}
        requests = [
            send(prompt, **greedy, custom_params={"fasa": fasa} if fasa else None)
            for prompt, fasa in others
        ]
        requests += [
            send(prompt, beam_width=2, n=2, max_new_tokens=BEAM_TOKENS) for prompt in prompts
        ]
        return await asyncio.gather(*requests)

    replies = engine.loop.run_until_complete(send_all())
    return replies[len(others) :], replies[: len(others)]


def sequences(reply: dict[str, Any]) -> list[list[int]]:
    """The tokens of a beam search's results, best first."""
    return [result["output_ids"] for result in reply["meta_info"]["beam_results"]]


@pytest.mark.slow
def test_dense_covered_and_beam_requests_equal_torch_native(
    smollm2_path: Path, smollm2_calibration: str, draw: Callable[[Any, Any], Any]
) -> None:
    """Every prompt dense, with a budget that covers it, and with a small one, all in one batch.

    A beam search appends rows to decode batches that belong to no request. It runs beside sparse
    and pruning requests, whose replies must be those that they give alone.
    """
    count, longest, max_new_tokens = draw((6, 600, 8), (24, 4000, 16))
    prompts = mixed_prompts(AutoTokenizer.from_pretrained(smollm2_path), count, longest)
    beam_prompts = prompts[2:4]
    with running_engine(smollm2_path, None, **SERVER) as engine:
        none = [None] * count
        expected = generate(engine, prompts, none, max_new_tokens, return_logprob=True)
        expected_beams = beams(engine, beam_prompts)[0] if BEAMS else []
    fasa: list[Any] = [None, False, {"budget": 8192}, {"budget": 8192, "prefix": "full"}]
    fasa += [{"budget": 64}, {"budget": 100, "sink": 0, "recent": 8}]
    # Every prompt dense, covered and sparse, in turn with either form of each.
    requests = [(i, fasa[2 * kind + (i + kind) % 2]) for i in range(count) for kind in range(3)]
    random.Random(0).shuffle(requests)
    beside = [
        (prompts[3], SPARSE),
        (prompts[3], PRUNING),
        (prompts[2], None),
        (prompts[2], PRUNING),
    ]
    settings = {**SETTINGS, "calibration": smollm2_calibration}
    with running_engine(smollm2_path, settings, **SERVER) as engine:
        replies = generate(
            engine,
            [prompts[i] for i, _ in requests],
            [fasa for _, fasa in requests],
            max_new_tokens,
        )
        if BEAMS:
            found_beams, beside_beams = beams(engine, beam_prompts, beside)
            alone = [
                generate(
                    engine,
                    [prompt],
                    [fasa],
                    4 * BEAM_TOKENS,
                    return_logprob=True,
                    ignore_eos=True,
                )[0]
                for prompt, fasa in beside
            ]
    problems = []
    sparse_differs = 0
    for (i, fasa), reply in zip(requests, replies, strict=True):
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
    # The small budgets change replies, so the equalities above mean something.
    assert sparse_differs > 0
    if BEAMS:
        for own, reply in zip(expected_beams, found_beams, strict=True):
            assert sequences(reply) == sequences(own) and len(sequences(reply)) == 2
            assert reply["meta_info"]["fasa"]["sparse_steps"] == 0
        for (_, fasa), dense, reply in zip(beside, alone, beside_beams, strict=True):
            report = reply["meta_info"]["fasa"]
            assert report["pruned_tokens"] == dense["meta_info"]["fasa"]["pruned_tokens"]
            assert (report["pruned_tokens"] > 0) == (fasa == PRUNING)
            problem = divergence(dense, reply)
            if problem:
                problems.append(f"beside a beam search, fasa={fasa}: {problem}")
    assert not problems, "\n".join(problems)
