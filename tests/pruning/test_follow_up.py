"""What the prefix cache keeps of a pruned conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from serving import divergence, generate

ASKED = {"budget": 40, "sink": 2, "recent": 4, "prune": "generated", "prune_budget": 30}


def test_a_follow_up_answers_as_over_a_cold_unpruned_run(
    random_model: Path, random_calibration: str
) -> None:
    """Only intact keys are cached: the prompt, and of the reply what no sparse step wrote."""
    settings: dict[str, Any] = {"calibration": random_calibration, "min_seq_len": 0}
    settings |= {"prune_interval": 8, "prune_recent": 8, "prune_grace": 4}
    prompt = list(range(200, 300))
    with running_engine(random_model, settings, skip_tokenizer_init=True) as engine:
        [pruned] = generate(engine, [prompt], [ASKED], 150, ignore_eos=True)
        report = pruned["meta_info"]["fasa"]
        # 150 generated, the last one not cached; at most an interval too many are left.
        assert 149 - 30 - 8 <= report["pruned_tokens"] <= 149 - 30
        assert report["kv_read_ratio"] < 0.6
        follow_up = [*prompt, *pruned["output_ids"], 7, 8, 9]
        [warm] = generate(engine, [follow_up], [False], 20, ignore_eos=True)
        assert len(prompt) - 1 <= warm["meta_info"]["cached_tokens"] <= len(prompt) + 1
        flush_cache(engine)
        [cold] = generate(engine, [follow_up], [False], 20, return_logprob=True, ignore_eos=True)
        assert divergence(cold, warm) is None
        # The same request does the same again, though its slots are others; on a GPU ties are
        # broken as they come.
        if not torch.cuda.is_available():
            flush_cache(engine)
            [again] = generate(engine, [prompt], [ASKED], 150, ignore_eos=True)
            assert again["output_ids"] == pruned["output_ids"]
        # And pruning is not idle: what it took away would have been read.
        kept = {key: value for key, value in ASKED.items() if not key.startswith("prune")}
        [whole] = generate(engine, [prompt], [kept], 150, ignore_eos=True)
        assert whole["meta_info"]["fasa"]["pruned_tokens"] == 0
        assert whole["output_ids"] != pruned["output_ids"]


def test_only_thinking_is_pruned(random_model: Path, random_calibration: str) -> None:
    """Where thinking ends is told by a token; one that never comes makes all of it thinking."""
    settings: dict[str, Any] = {"calibration": random_calibration, "min_seq_len": 0}
    settings |= {"prune_interval": 8, "prune_recent": 8, "prune_grace": 4}
    prompt = list(range(300, 360))
    thinking = {**ASKED, "prune": "think"}
    with running_engine(
        random_model, {**settings, "think_end_ids": [8191]}, skip_tokenizer_init=True
    ) as engine:
        [never] = generate(engine, [prompt], [thinking], 150, ignore_eos=True)
    assert 8191 not in never["output_ids"]
    everything = never["meta_info"]["fasa"]["pruned_tokens"]
    assert everything > 100
    end = never["output_ids"][60]
    first = never["output_ids"].index(end)
    with running_engine(
        random_model, {**settings, "think_end_ids": [end]}, skip_tokenizer_init=True
    ) as engine:
        [ended] = generate(engine, [prompt], [thinking], 150, ignore_eos=True)
    assert ended["output_ids"][: first + 1] == never["output_ids"][: first + 1]
    assert ended["meta_info"]["fasa"]["pruned_tokens"] <= max(0, first - 30)
    assert (ended["meta_info"]["fasa"]["pruned_tokens"] > 0) == (first >= 38)
