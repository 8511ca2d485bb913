"""Requests that reach the scheduler without the check of the tokenizer process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.plugins import load_plugins

from fasa_sglang.workloads.serving.engine import flush_cache, running_engine

PRUNE = {"budget": 30, "sink": 2, "recent": 4, "prune": "generated", "prune_budget": 20}
BAD: list[tuple[Any, str]] = [
    ({"fasa": {"budget": 10**6}}, "server's max_budget = 64 tokens, got 1000000"),
    ({"fasa": {"budjet": 1}}, "fasa has no key 'budjet'"),
    ({"fasa": {**PRUNE, "prune": "think"}}, "needs to know where thinking ends"),
    ({"fasa": "yes"}, "fasa must be true, false or an object"),
]


@pytest.mark.parametrize("admission", [False, True], ids=["plain", "prune admission"])
def test_unchecked_request_is_aborted_alone(
    random_model: Path,
    random_calibration: str,
    monkeypatch: pytest.MonkeyPatch,
    admission: bool,
) -> None:
    """The tokenizer manager lives in this process; the scheduler installs its own hooks."""
    load_plugins()
    checked = TokenizerManager._create_tokenized_object
    monkeypatch.setattr(TokenizerManager, "_create_tokenized_object", checked.__wrapped__)
    # Otherwise a slot that is not freed would only be found when the server is idle.
    monkeypatch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1")
    settings: dict[str, Any] = {"calibration": random_calibration, "min_seq_len": 0}
    settings |= {"prune_interval": 8, "prune_recent": 4, "prune_grace": 2}
    settings |= {"budget": 32, "sink": 2, "recent": 4, "max_budget": 64}
    settings["prune_admission"] = admission
    with running_engine(
        random_model, settings, skip_tokenizer_init=True, max_total_tokens=600
    ) as engine:

        async def send(prompt: list[int], custom_params: Any, tokens: int = 40) -> Any:
            params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
            return await engine.async_generate(
                input_ids=prompt, sampling_params={**params, "custom_params": custom_params}
            )

        prompt = list(range(300, 340))
        good = [None, {"fasa": True}, {"fasa": PRUNE}]

        async def run() -> tuple[list[Any], list[Any]]:
            alone = [await send(prompt, custom_params) for custom_params in good]
            requests = [send(prompt, custom_params) for custom_params in good]
            # A prefix that the running requests share, and one of their own.
            requests += [send(prompt[:i] + prompt, params) for i, (params, _) in enumerate(BAD)]
            return alone, await asyncio.gather(*requests, return_exceptions=True)

        alone, replies = engine.loop.run_until_complete(run())
        flush_cache(engine)
        [whole] = engine.loop.run_until_complete(asyncio.gather(send([7] * 550, None, tokens=4)))
    for expected, reply in zip(alone, replies, strict=False):
        assert reply["output_ids"] == expected["output_ids"]
        assert reply["meta_info"]["fasa"] == expected["meta_info"]["fasa"]
    assert replies[2]["meta_info"]["fasa"]["pruned_tokens"] > 0
    for error, (_, message) in zip(replies[len(good) :], BAD, strict=True):
        assert isinstance(error, ValueError), error
        assert message in str(error)
    assert whole["meta_info"]["completion_tokens"] == 4
