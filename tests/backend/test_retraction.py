"""Requests that SGLang takes back and prefills again.

A file of its own: shutting an engine down kills all engines of the process, and the fixture of
``test_radix.py`` keeps one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fasa_sglang.workloads.serving.engine import running_engine
from serving import divergence, generate


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
def test_retracted_requests_answer_as_if_alone(
    tiny_path: Path, tiny_calibration: str, overlap: bool
) -> None:
    """A pool too small for all: SGLang takes requests back and prefills them again, densely."""
    settings = {"calibration": tiny_calibration, "min_seq_len": 0}
    prompts = [[500 + i, *list(range(20, 90 + 3 * i))] for i in range(6)]
    asked = [None, {"budget": 4096}, None, {"budget": 40}, {"budget": 4096}, None]
    with running_engine(
        tiny_path,
        settings,
        max_total_tokens=700,
        schedule_conservativeness=0.01,
        max_running_requests=6,
        disable_overlap_schedule=not overlap,
    ) as engine:
        together = generate(engine, prompts, asked, 100)
        alone = [
            generate(engine, [prompt], [fasa], 100, return_logprob=True)[0]
            for prompt, fasa in zip(prompts, asked, strict=True)
        ]
    retracted = [reply["meta_info"]["num_retractions"] for reply in together]
    assert sum(retracted) > 0
    for fasa, one, other, times in zip(asked, alone, together, retracted, strict=True):
        report = other["meta_info"]["fasa"]
        steps = report["sparse_steps"] + report["dense_steps"]
        # Each retraction turns one decode step into a prefill.
        assert steps == len(other["output_ids"]) - 1 - times
        if fasa != {"budget": 40}:
            assert divergence(one, other) is None
