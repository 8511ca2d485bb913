"""Prefill by another of SGLang's backends: keys get their labels all the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.workloads.serving.engine import running_engine
from fasa_sglang.workloads.serving.greedy import generate

SERVER = {"chunked_prefill_size": 128, "max_total_tokens": 2000, "skip_tokenizer_init": True}
SPARSE = {"budget": 40, "sink": 2, "recent": 4}
Run = tuple[bytes, list[list[int]], list[list[int]]]


def run(model: Path, cache: Path, **flags: Any) -> Run:
    """Calibrate at start; dense replies that fill the prefix cache, and sparse ones over it."""
    draw = random.Random(0)
    shared = [draw.randrange(100, 8000) for _ in range(600)]
    prompts = [[*shared, *[draw.randrange(100, 8000) for _ in range(n)]] for n in (5, 60, 200)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        with running_engine(model, {"min_seq_len": 0}, **SERVER, **flags) as engine:
            [calibration] = cache.glob("fasa-sglang/calibrations/*.fasa")
            generate(engine, [shared], [None], 1)
            dense = generate(engine, prompts, [None] * 3, 24, ignore_eos=True)
            sparse = generate(engine, prompts, [SPARSE] * 3, 24, ignore_eos=True)
    # One of the two layers is dense.
    for reply in sparse:
        assert reply["meta_info"]["cached_tokens"] >= len(shared)
        assert reply["meta_info"]["fasa"]["kv_read_ratio"] < 0.6
    ids = [[reply["output_ids"] for reply in replies] for replies in (dense, sparse)]
    return calibration.read_bytes(), ids[0], ids[1]


def test_calibration_and_replies_are_those_of_fasa_alone(tiny_path: Path, tmp_path: Path) -> None:
    """On a CPU, the same attention in another place."""
    alone = run(tiny_path, tmp_path / "alone")
    split = run(tiny_path, tmp_path / "split", prefill_attention_backend="torch_native")
    assert split == alone
    _, dense, sparse = alone
    assert all(d != s for d, s in zip(dense, sparse, strict=True))
