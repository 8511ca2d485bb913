"""Forced replies and what they report about every step."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.serving.engine import running_engine
from fasa_sglang.workloads.serving.forced import (
    FLOOR,
    ForceTokens,
    Step,
    agreement,
    divergence,
    forced_request,
    sampled_divergence,
    steps,
)


def step(logits: torch.Tensor, forced: int, shown: int) -> Step:
    """A step as a server returns it, with ``shown`` other tokens."""
    logprobs = logits.log_softmax(dim=-1)
    others = {
        int(i): float(logprobs[i]) for i in logprobs.topk(shown + 1).indices if int(i) != forced
    }
    return Step(forced, float(logprobs[forced]), others)


def together(
    engine: Any, prompts: list[list[int]], bodies: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Replies to requests that decode in one batch."""

    async def send() -> list[dict[str, Any]]:
        requests = (
            engine.async_generate(input_ids=prompt, **body)
            for prompt, body in zip(prompts, bodies, strict=True)
        )
        return await asyncio.gather(*requests)

    return engine.loop.run_until_complete(send())


def test_divergence_over_all_tokens_is_exact_and_over_few_a_lower_bound() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        one, other = torch.randn(2, 50) * 3
        p, q = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
        exact = float((p.exp() * (p - q)).sum())
        value = divergence(step(one, 7, 49), step(other, 7, 49))
        assert value == pytest.approx(exact, rel=1e-4)
        bounds = [divergence(step(one, 7, n), step(other, 7, n)) for n in (2, 10, 30)]
        assert all(0 <= bound <= exact * (1 + 1e-4) for bound in bounds)
    assert divergence(step(one, 7, 10), step(one, 7, 10)) == pytest.approx(0, abs=1e-6)


def test_sampled_divergence_is_exact_on_average() -> None:
    """At a high temperature, tokens outside the best 64 have much of the probability."""
    torch.manual_seed(0)
    for shown in (1, 4, 20):
        p, q = (torch.randn(2, 40) * 2).log_softmax(dim=-1)
        exact = float((p.exp() * (p - q)).sum())
        average = 0.0
        for drawn in range(40):
            pair = []
            for logprobs in (p, q):
                order = logprobs.argsort(descending=True).tolist()
                best = {i: float(logprobs[i]) for i in order if i != drawn}
                others = dict(list(best.items())[:shown])
                pair.append(Step(drawn, float(logprobs[drawn]), others))
            average += float(p[drawn].exp()) * sampled_divergence(*pair)
        assert average == pytest.approx(exact, rel=1e-4)


def test_force_tokens_keeps_all_probabilities_readable() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 30) * 5
    replies = [[4, 9], [11]]
    params: list[dict[str, Any]] = [
        forced_request(ids, {}, top_tokens=28)["sampling_params"]["custom_params"]
        for ids in replies
    ]
    processor = ForceTokens()
    for number in range(2):
        returned = processor(rows.clone(), params).log_softmax(dim=-1)
        for i, ids in enumerate(replies):
            logprobs = rows[i].log_softmax(dim=-1)
            if number >= len(ids):
                # All tokens were forced: the model decodes freely.
                torch.testing.assert_close(returned[i], logprobs)
                continue
            assert returned[i].argmax() == ids[number]
            top = [(float(v), t, None) for t, v in enumerate(returned[i])]
            carrier = params[i]["forced_carrier"]
            reply = {"output_ids": [ids[number]], "meta_info": {"output_top_logprobs": [top]}}
            [got] = steps(reply, [ids[number]])
            assert got.logprob == pytest.approx(float(logprobs[ids[number]]), abs=2e-5)
            for token, logprob in got.others.items():
                assert logprob == pytest.approx(float(logprobs[token]), abs=2e-5)
            assert carrier not in got.others and ids[number] not in got.others


def test_force_tokens_with_an_unlikely_token_reports_the_floor() -> None:
    rows = torch.zeros(1, 10)
    rows[0, 3] = -200
    params = [forced_request([3], {})["sampling_params"]["custom_params"]]
    returned = ForceTokens()(rows, params)[0].log_softmax(dim=-1)
    top = [(float(returned[t]), t, None) for t in returned.topk(4).indices.tolist()]
    [got] = steps({"output_ids": [3], "meta_info": {"output_top_logprobs": [top]}}, [3])
    assert got.logprob == pytest.approx(FLOOR, abs=1e-4)
    assert all(value == pytest.approx(-math.log(9), abs=1e-4) for value in got.others.values())


def test_forced_and_sampled_requests_share_a_batch(
    random_model: Path, random_calibration: str
) -> None:
    """SGLang 0.5.17 crashes if only some requests of a batch set ``token_ids_logprob``.

    If a request of the batch is sampled, SGLang returns logarithms of probabilities. The smallest
    of these were 0, which gave a divergence of 1e34.
    """
    body = forced_request(list(range(40, 60)), {"fasa": False})
    assert "token_ids_logprob" not in body
    plain = {"sampling_params": {"temperature": 1, "max_new_tokens": 20, "ignore_eos": True}}
    with running_engine(
        random_model,
        {"calibration": random_calibration, "min_seq_len": 0},
        skip_tokenizer_init=True,
        max_total_tokens=2000,
        enable_custom_logit_processor=True,
    ) as engine:
        [alone] = together(engine, [[5] * 20], [body])
        forced, free = together(engine, [[5] * 20, [6] * 20], [body, plain])
    expected, run = (steps(reply, range(40, 60)) for reply in (alone, forced))
    assert [step.token_id for step in run] == list(range(40, 60))
    for reference, step in zip(expected, run, strict=True):
        assert step.logprob == pytest.approx(reference.logprob, abs=1e-3)
        assert dict(step.others) == pytest.approx(dict(reference.others), abs=1e-3)
    assert len(free["output_ids"]) == 20


def test_forced_reply_to_a_chunked_prompt_starts_at_its_first_token(
    random_model: Path, random_calibration: str
) -> None:
    """Each chunk used to consume a forced token, so that all steps came one too late."""
    settings = {"calibration": random_calibration, "min_seq_len": 0}
    prompts, forced = [[5] * 150, [6] * 70], [[11, 12, 13, 14], [21, 22, 23]]
    bodies = [forced_request(ids, {"fasa": False}) for ids in forced]
    with running_engine(
        random_model,
        settings,
        skip_tokenizer_init=True,
        chunked_prefill_size=64,
        max_total_tokens=2000,
        enable_custom_logit_processor=True,
    ) as engine:
        replies = together(engine, prompts, bodies)
    for reply, ids in zip(replies, forced, strict=True):
        assert reply["output_ids"] == ids
        assert [step.token_id for step in steps(reply, ids)] == ids
        with pytest.raises(FasaError, match="did not follow the forced tokens from step 1 of 2"):
            steps(reply, [ids[0], 99])


@pytest.mark.usefixtures("spawned_processes")
def test_forced_reply_of_a_retracted_request_is_complete(
    random_model: Path, random_calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang drops the token that is in flight when it retracts a request.

    That token used to count as forced, so that the reply lacked it.
    """
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "7")
    forced = [list(range(base, base + 60)) for base in (100, 200, 300)]
    with running_engine(
        random_model,
        {"calibration": random_calibration, "min_seq_len": 0},
        skip_tokenizer_init=True,
        max_total_tokens=2000,
        enable_custom_logit_processor=True,
    ) as engine:
        bodies = [forced_request(ids, {"fasa": False}) for ids in forced]
        replies = together(engine, [[i] * 20 for i in range(5, 8)], bodies)
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 1
    assert [reply["output_ids"] for reply in replies] == forced
    with pytest.raises(FasaError, match="prefilled its tokens densely"):
        steps(max(replies, key=lambda reply: reply["meta_info"]["num_retractions"]), forced[0])


def test_agreement_leaves_out_the_prefill_step() -> None:
    """The first token comes from the prefill, which is dense in every setting."""
    best, worse = Step(1, -0.1, {2: -3.0}), Step(1, -3.0, {2: -0.1})
    assert agreement([worse, best, best, worse]) == pytest.approx(2 / 3)
    assert (best.best, worse.best) == (1, 2)
    assert best.lead == pytest.approx(2.9)
