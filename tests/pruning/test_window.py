"""Pruning against a run that never prunes and attends to the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasa_sglang.workloads.serving.engine import EAGER, running_engine
from fasa_sglang.workloads.serving.greedy import divergence, generate

KEPT, NEW_TOKENS = 24, 90
PRUNE = {"prune": "generated", "prune_budget": KEPT, "budget": 4000, "sink": 0, "recent": 1}


def test_prune_oldest_at_every_step_equals_a_sliding_window(
    random_model: Path, random_calibration: str
) -> None:
    """Every lane but one has tombstones.

    The window comes from another selector: the whole prompt as sink, then the tokens that pruning
    keeps and the current one.
    """
    prompts = [list(range(200, 200 + length)) for length in (3, 40, 130)]
    windows: list[Any] = [
        {
            "selector": "streaming",
            "budget": len(prompt) + KEPT + 1,
            "sink": len(prompt),
            "recent": KEPT,
        }
        for prompt in prompts
    ]
    prompts.append(list(range(500, 560)))
    pruned = [PRUNE, {**PRUNE, "prefix": "full"}, PRUNE, None]
    common: dict[str, Any] = {"skip_tokenizer_init": True, "max_running_requests": 4}
    settings: dict[str, Any] = {
        "calibration": random_calibration,
        "min_seq_len": 0,
        "num_dense_layers": 0,
        "prune_interval": 1,
        "prune_recent": 4,
        "prune_grace": 1,
        "prune_rule": "oldest",
    }
    with running_engine(random_model, {**settings, "selector": "any"}, **common, **EAGER) as engine:
        expected = generate(
            engine, prompts, [*windows, None], NEW_TOKENS, return_logprob=True, ignore_eos=True
        )
        runs = [generate(engine, prompts, pruned, NEW_TOKENS, ignore_eos=True)]
    if torch.cuda.is_available():  # Once more in CUDA graphs.
        with running_engine(random_model, settings, **common) as engine:
            runs.append(generate(engine, prompts, pruned, NEW_TOKENS, ignore_eos=True))
    for replies in runs:
        counts = [reply["meta_info"]["fasa"]["pruned_tokens"] for reply in replies]
        assert min(counts[:3]) > NEW_TOKENS - KEPT - 5
        assert counts[3] == 0
        problems = [divergence(*pair) for pair in zip(expected, replies, strict=True)]
        assert not any(problems), problems
