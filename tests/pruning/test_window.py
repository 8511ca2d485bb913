"""Pruning against a run that never prunes and attends to the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.workloads.serving.engine import EAGER, running_engine
from serving import divergence, generate

KEPT, NEW_TOKENS = 24, 90
GRAPHS = ["eager", "graphs"] if torch.cuda.is_available() else ["eager"]


@pytest.mark.parametrize("graphs", GRAPHS)
def test_pruning_the_oldest_at_every_step_is_a_sliding_window(
    random_model: Path, random_calibration: str, graphs: str
) -> None:
    """With holes in every lane but one, replies are those of the window.

    The window is a selector of its own: the whole prompt as sink, then the last tokens, the current
    one on top of what pruning keeps.
    """
    prompts = [list(range(200, 200 + length)) for length in (3, 40, 130)]
    common: dict[str, Any] = {"skip_tokenizer_init": True, "max_running_requests": 4}
    settings: dict[str, Any] = {"calibration": random_calibration, "min_seq_len": 0}
    settings |= {"num_dense_layers": 0, "prune_interval": 1}
    settings |= {"prune_recent": 4, "prune_grace": 1, "prune_rule": "oldest"}
    windows: list[Any] = [
        {"budget": len(prompt) + KEPT + 1, "sink": len(prompt), "recent": KEPT}
        for prompt in prompts
    ]
    windows = [{**window, "selector": "streaming"} for window in windows] + [None]
    prompts.append(list(range(500, 560)))
    with running_engine(random_model, {**settings, "selector": "any"}, **common, **EAGER) as engine:
        expected = generate(
            engine, prompts, windows, NEW_TOKENS, return_logprob=True, ignore_eos=True
        )
    prune = {"prune": "generated", "prune_budget": KEPT, "budget": 4000, "sink": 0, "recent": 1}
    asked = [prune, {**prune, "prefix": "full"}, prune, None]
    extra = EAGER if graphs == "eager" else {}
    with running_engine(random_model, settings, **common, **extra) as engine:
        got = generate(engine, prompts, asked, NEW_TOKENS, ignore_eos=True)
    pruned = [reply["meta_info"]["fasa"]["pruned_tokens"] for reply in got]
    assert min(pruned[:3]) > NEW_TOKENS - KEPT - 5
    assert pruned[3] == 0
    problems = [divergence(*pair) for pair in zip(expected, got, strict=True)]
    assert not any(problems), problems
