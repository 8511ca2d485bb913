"""Requests whose slots SGLang takes back, to prefill them again later.

In a file of its own: shutting an engine down ends all engines of the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.workloads.serving.engine import running_engine
from fasa_sglang.workloads.serving.greedy import divergence, generate


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
def test_retracted_requests_with_exact_keys_answer_as_if_alone(
    tiny_path: Path, tiny_calibration: str, overlap: bool
) -> None:
    """The pool is too small for all. A second prefill is dense, so a sparse reply may change."""
    settings = {"calibration": tiny_calibration, "min_seq_len": 0}
    prompts = [[500 + i, *list(range(20, 90 + 3 * i))] for i in range(6)]
    sparse = {"budget": 40}
    requests: list[Any] = [None, {"budget": 4096}, None, sparse, {"budget": 4096}, None]
    with running_engine(
        tiny_path,
        settings,
        max_total_tokens=700,
        schedule_conservativeness=0.01,
        max_running_requests=6,
        disable_overlap_schedule=not overlap,
    ) as engine:
        together = generate(engine, prompts, requests, 100)
        alone = [
            generate(engine, [prompt], [fasa], 100, return_logprob=True)[0]
            for prompt, fasa in zip(prompts, requests, strict=True)
        ]
    retractions = [reply["meta_info"]["num_retractions"] for reply in together]
    assert sum(retractions) > 0
    for fasa, expected, reply, count in zip(requests, alone, together, retractions, strict=True):
        report = reply["meta_info"]["fasa"]
        # Each retraction turns one decode step into a prefill.
        steps = len(reply["output_ids"]) - 1 - count
        assert report["sparse_steps"] + report["dense_steps"] == steps
        if fasa != sparse:
            problem = divergence(expected, reply)
            assert problem is None, problem
