"""What a forced run says of every step."""

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
    """A step as it comes back, ``shown`` other tokens of it."""
    held = logits.log_softmax(dim=-1)
    others = {int(i): float(held[i]) for i in held.topk(shown + 1).indices if int(i) != forced}
    return Step(forced, float(held[forced]), others)


def together(
    engine: Any, prompts: list[list[int]], bodies: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Replies to requests that decode in one batch."""

    async def ask() -> list[dict[str, Any]]:
        asked = (
            engine.async_generate(input_ids=prompt, **body)
            for prompt, body in zip(prompts, bodies, strict=True)
        )
        return await asyncio.gather(*asked)

    return engine.loop.run_until_complete(ask())


def test_divergence_is_exact_over_all_tokens_and_a_lower_bound_over_few() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        one, other = torch.randn(2, 50) * 3
        p, q = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
        exact = float((p.exp() * (p - q)).sum())
        found = divergence(step(one, 7, 49), step(other, 7, 49))
        assert found == pytest.approx(exact, rel=1e-4)
        bounds = [divergence(step(one, 7, n), step(other, 7, n)) for n in (2, 10, 30)]
        assert all(0 <= bound <= exact * (1 + 1e-4) for bound in bounds)
    assert divergence(step(one, 7, 10), step(one, 7, 10)) == pytest.approx(0, abs=1e-6)


def test_divergence_of_drawn_tokens_is_exact_on_average() -> None:
    """A lower bound by 64 tokens leaves out what a high temperature spreads over all others."""
    torch.manual_seed(0)
    for shown in (1, 4, 20):
        p, q = (torch.randn(2, 40) * 2).log_softmax(dim=-1)
        exact = float((p.exp() * (p - q)).sum())
        found = 0.0
        for drawn in range(40):
            made = []
            for held in (p, q):
                best = [i for i in held.argsort(descending=True).tolist() if i != drawn][:shown]
                made.append(Step(drawn, float(held[drawn]), {i: float(held[i]) for i in best}))
            found += float(p[drawn].exp()) * sampled_divergence(*made)
        assert found == pytest.approx(exact, rel=1e-4)


def test_the_processor_forces_and_leaves_every_probability_readable() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 30) * 5
    wanted = [[4, 9], [11]]
    params: list[dict[str, Any]] = [
        forced_request(ids, {}, top_tokens=28)["sampling_params"]["custom_params"] for ids in wanted
    ]
    processor = ForceTokens()
    for number in range(2):
        made = processor(rows.clone(), params).log_softmax(dim=-1)
        for i, ids in enumerate(wanted):
            held = rows[i].log_softmax(dim=-1)
            if number >= len(ids):
                # Nothing left to force: the model goes on by itself.
                torch.testing.assert_close(made[i], held)
                continue
            assert made[i].argmax() == ids[number]
            top = [(float(v), t, None) for t, v in enumerate(made[i])]
            carrier = params[i]["forced_carrier"]
            reply = {"output_ids": [ids[number]], "meta_info": {"output_top_logprobs": [top]}}
            [got] = steps(reply, [ids[number]])
            assert got.logprob == pytest.approx(float(held[ids[number]]), abs=2e-5)
            for token, logprob in got.others.items():
                assert logprob == pytest.approx(float(held[token]), abs=2e-5)
            assert carrier not in got.others and ids[number] not in got.others


def test_an_unlikely_forced_token_is_still_the_carriers() -> None:
    rows = torch.zeros(1, 10)
    rows[0, 3] = -200
    params = [forced_request([3], {})["sampling_params"]["custom_params"]]
    made = ForceTokens()(rows, params).log_softmax(dim=-1)
    top = [(float(made[0][t]), t, None) for t in made[0].topk(4).indices.tolist()]
    [got] = steps({"output_ids": [3], "meta_info": {"output_top_logprobs": [top]}}, [3])
    assert got.logprob == pytest.approx(FLOOR, abs=1e-4)
    assert all(value == pytest.approx(-math.log(9), abs=1e-4) for value in got.others.values())


def test_forced_and_other_requests_share_a_batch(
    random_model: Path, random_calibration: str
) -> None:
    """One request with ``token_ids_logprob`` beside one without ended a server of SGLang 0.5.17.

    Beside a sampled one SGLang takes the logarithm of probabilities, of which the smallest were 0:
    what was read from them was a divergence of 1e34.
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
    expected, made = (steps(reply, range(40, 60)) for reply in (alone, forced))
    assert [step.token_id for step in made] == list(range(40, 60))
    for theirs, mine in zip(expected, made, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert dict(mine.others) == pytest.approx(dict(theirs.others), abs=1e-3)
    assert len(free["output_ids"]) == 20


def test_a_prompt_in_chunks_is_followed_from_its_first_token(
    random_model: Path, random_calibration: str
) -> None:
    """Each chunk used to take a forced token: at 8k tokens all steps came one too late."""
    settings = {"calibration": random_calibration, "min_seq_len": 0}
    prompts, wanted = [[5] * 150, [6] * 70], [[11, 12, 13, 14], [21, 22, 23]]
    bodies = [forced_request(ids, {"fasa": False}) for ids in wanted]
    with running_engine(
        random_model,
        settings,
        skip_tokenizer_init=True,
        chunked_prefill_size=64,
        max_total_tokens=2000,
        enable_custom_logit_processor=True,
    ) as engine:
        replies = together(engine, prompts, bodies)
    for reply, ids in zip(replies, wanted, strict=True):
        assert reply["output_ids"] == ids
        assert [made.token_id for made in steps(reply, ids)] == ids
        with pytest.raises(FasaError, match="did not follow the forced tokens from step 1 of 2"):
            steps(reply, [ids[0], 99])


def test_a_retracted_request_goes_on_where_it_was(
    random_model: Path, random_calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step under way samples for a request that is retracted is dropped: asked for again.

    It counted as followed, so the reply lacked a forced token wherever the pool was too small.
    """
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "7")
    wanted = [list(range(base, base + 60)) for base in (100, 200, 300)]
    with running_engine(
        random_model,
        {"calibration": random_calibration, "min_seq_len": 0},
        skip_tokenizer_init=True,
        max_total_tokens=2000,
        enable_custom_logit_processor=True,
    ) as engine:
        bodies = [forced_request(ids, {"fasa": False}) for ids in wanted]
        replies = together(engine, [[i] * 20 for i in range(5, 8)], bodies)
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 1
    assert [reply["output_ids"] for reply in replies] == wanted
    with pytest.raises(FasaError, match="prefilled its tokens densely"):
        steps(max(replies, key=lambda reply: reply["meta_info"]["num_retractions"]), wanted[0])


def test_agreement_counts_decode_steps_only() -> None:
    """The first token comes from the dense prefill, whatever the setting."""
    led, behind = Step(1, -0.1, {2: -3.0}), Step(1, -3.0, {2: -0.1})
    assert agreement([behind, led, led, behind]) == pytest.approx(2 / 3)
    assert (led.best, behind.best) == (1, 2)
    assert led.lead == pytest.approx(2.9)
