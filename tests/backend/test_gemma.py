"""Gemma-3-270M: sliding windows in five of six layers, and real weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasa_sglang.calibration import corpus
from fasa_sglang.workloads.serving.engine import running_engine
from fasa_sglang.workloads.serving.greedy import generate
from serving import Agreement

# Fetching the model and starting it take minutes.
pytestmark = pytest.mark.thorough

LENGTHS = (2048, 4096, 8192)
NEW_TOKENS = 24
# On a busy core, a prefill of 8,192 tokens takes longer than the five minutes after which SGLang
# would end the engine.
SERVER = {"max_total_tokens": 20000, "watchdog_timeout": 1500}
COVERED = {"budget": 16384}
SPARSE = {"budget": 64}
QUESTION = "Question: What is the capital of France?\nAnswer:"


@pytest.fixture(scope="module")
def prompts(gemma_path: Path) -> list[list[int]]:
    """One prompt for each of ``LENGTHS``, with nothing in common but the BOS token."""
    tokenizer = AutoTokenizer.from_pretrained(gemma_path)
    first, *ids = tokenizer(corpus.default_text().content).input_ids
    assert first == tokenizer.bos_token_id
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [
        [first, *ids[start : start + length - 1]]
        for start, length in zip(starts, LENGTHS, strict=True)
    ]


@pytest.fixture(scope="module")
def dense(gemma_path: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Replies of SGLang's own backend."""
    with running_engine(gemma_path, None, **SERVER) as engine:
        none = [None] * len(prompts)
        return generate(engine, prompts, none, NEW_TOKENS, return_logprob=True, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(
    dense: list[dict[str, Any]], gemma_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Calibrates at start. Started after ``dense`` has ended: one engine runs at a time."""
    cache = tmp_path_factory.mktemp("cache")
    settings = {"min_seq_len": 0, "max_budget": COVERED["budget"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        with running_engine(gemma_path, settings, **SERVER) as running:
            assert len(list(cache.glob("fasa-sglang/calibrations/*.fasa"))) == 1
            yield running


def test_dense_replies_equal_transformers(
    gemma_path: Path, prompts: list[list[int]], dense: list[dict[str, Any]]
) -> None:
    """SGLang keeps to the windows on a CPU, too. Without them, the model predicts 4 of the last 65
    tokens of this prompt as it does with them."""
    model = AutoModelForCausalLM.from_pretrained(gemma_path, dtype=torch.float32)
    tokens = model.generate(
        torch.tensor([prompts[0]]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    agreement = Agreement()
    agreement.compare(dense[0], {"output_ids": tokens[0, LENGTHS[0] :].tolist()})
    agreement.require(0.9)


def test_question_as_text_is_answered(engine: Any) -> None:
    """The tokenizer puts a BOS token before it, which transformers does not read off the GGUF."""
    reply = engine.generate(QUESTION, {"temperature": 0, "max_new_tokens": 2})
    assert reply["text"].strip() == "Paris"


def test_covering_budgets_equal_sglang_and_small_ones_do_not(
    engine: Any, prompts: list[list[int]], dense: list[dict[str, Any]]
) -> None:
    """Two batches: dense requests alone, then dense, covered and sparse ones together."""
    few, agreement = Agreement(), Agreement()
    batches = [
        list(zip(prompts, dense, [None] * 3, strict=True)),
        [
            (prompts[0], dense[0], None),
            *zip(prompts, dense, [COVERED] * 3, strict=True),
            *zip(prompts, dense, [SPARSE] * 3, strict=True),
        ],
    ]
    for batch in batches:
        replies = generate(
            engine,
            [prompt for prompt, _, _ in batch],
            [fasa for _, _, fasa in batch],
            NEW_TOKENS,
            ignore_eos=True,
        )
        for (prompt, expected, fasa), reply in zip(batch, replies, strict=True):
            report = reply["meta_info"]["fasa"]
            assert report["sparse_steps"] == (NEW_TOKENS - 1 if fasa else 0)
            # Two of three layers that attend to everything select, the first one stays dense.
            share = (1 + 2 * SPARSE["budget"] / len(prompt)) / 3 if fasa == SPARSE else 1
            assert report["kv_read_ratio"] == pytest.approx(share, abs=0.01)
            compared = few if fasa == SPARSE else agreement
            compared.compare(expected, reply, f"{len(prompt)} tokens, fasa={fasa}")
    agreement.require(0.9)
    assert few.problems
