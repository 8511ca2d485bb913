"""Many requests at once, each as if it were alone.

A file of its own: shutting an engine down kills all engines of the process.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from serving import divergence, generate

FASA: list[Any] = [None, False, True, {"budget": 40}, {"budget": 64, "prefix": "full"}]
SERVER = {"max_total_tokens": 20000, "max_running_requests": 24}


@pytest.mark.slow
def test_mixed_requests_answer_as_if_alone(
    tiny_path: Path, tiny_calibration: str, draw: Callable[[Any, Any], Any]
) -> None:
    """Off as SGLang's own backend answers, on as the same request answers by itself."""
    generator = random.Random(0)
    shared = [generator.randrange(3, 49152) for _ in range(150)]
    prompts = [
        shared[: generator.choice((0, 60, 150))]
        + [generator.randrange(3, 49152) for _ in range(generator.randint(1, 120))]
        for _ in range(draw(40, 200))
    ]
    asked = [generator.choice(FASA) for _ in prompts]
    settings = {"calibration": tiny_calibration, "min_seq_len": 0, "budget": 48}
    with running_engine(tiny_path, settings, **SERVER) as engine:
        together = generate(engine, prompts, asked, 12)
        alone = {}
        for i, (prompt, fasa) in enumerate(zip(prompts, asked, strict=True)):
            if fasa:
                flush_cache(engine)
                [alone[i]] = generate(engine, [prompt], [fasa], 12, return_logprob=True)
    with running_engine(tiny_path, None, **SERVER) as engine:
        for i, (prompt, fasa) in enumerate(zip(prompts, asked, strict=True)):
            if not fasa:
                [alone[i]] = generate(engine, [prompt], [None], 12, return_logprob=True)
    problems = []
    for i, (fasa, reply) in enumerate(zip(asked, together, strict=True)):
        if fasa:
            assert reply["meta_info"]["fasa"] == alone[i]["meta_info"]["fasa"]
        problem = divergence(alone[i], reply)
        if problem:
            problems.append(f"fasa={fasa}: {problem}")
    assert not problems, "\n".join(problems)
