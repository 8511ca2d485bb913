"""A real server over HTTP: what it serves, what it refuses, and that it goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

PROMPT = "def add(a, b):\n" * 40


def generate(server: str, custom_params: Any, **more: Any) -> httpx.Response:
    params = {"temperature": 0, "max_new_tokens": 6, "custom_params": custom_params}
    body = {"text": PROMPT, "sampling_params": params, **more}
    return httpx.post(f"{server}/generate", json=body, timeout=120)


def test_generate_reports_what_was_read(server: str) -> None:
    reply = generate(server, {"fasa": {"budget": 64}}).json()
    report = reply["meta_info"]["fasa"]
    assert report["sparse_steps"] == 5
    assert report["dense_steps"] == 0
    assert report["budget"] == 64
    lengths = [reply["meta_info"]["prompt_tokens"] + i for i in range(1, 6)]
    # One of the two layers is dense.
    expected = sum(length + 64 for length in lengths) / (2 * sum(lengths))
    assert report["kv_read_ratio"] == pytest.approx(expected, abs=1e-6)
    assert generate(server, None).json()["meta_info"]["fasa"]["dense_steps"] == 5


def test_streaming_reports_in_the_last_chunk(server: str) -> None:
    """A report in every chunk cost host time at every step, of requests without FASA too."""
    params = {"temperature": 0, "max_new_tokens": 6, "custom_params": {"fasa": True}}
    body = {"text": PROMPT, "sampling_params": params, "stream": True}
    reports = []
    with httpx.stream("POST", f"{server}/generate", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                reports.append(json.loads(line[6:])["meta_info"].get("fasa"))
    assert len(reports) > 1
    assert set(reports[:-1]) == {None}
    assert reports[-1]["sparse_steps"] == 5


def test_several_samples_of_a_prompt_report_each(server: str) -> None:
    params = {"max_new_tokens": 4, "n": 3, "custom_params": {"fasa": True}}
    body = {"text": [PROMPT, "x = 1"], "sampling_params": params}
    replies = httpx.post(f"{server}/generate", json=body, timeout=120).json()
    assert len(replies) == 6
    assert all(isinstance(reply["meta_info"]["fasa"], dict) for reply in replies)


MESSAGES = [{"role": "user", "content": PROMPT}]
# Where an OpenAI client may write the switch.
PLACES = {
    "custom_params": lambda fasa: {"custom_params": {"fasa": fasa}},
    "top level": lambda fasa: {"fasa": fasa},
    "both": lambda fasa: {"fasa": fasa, "custom_params": {"fasa": fasa, "other": 1}},
}


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("place", PLACES)
def test_openai_chat(client: openai.OpenAI, place: str) -> None:
    """An answer with a covering budget equals the dense one; the report says which it was."""
    answers = {}
    for name, fasa in (("dense", False), ("covering", {"budget": 1024})):
        reply = client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0,
            max_tokens=6,
            extra_body=PLACES[place](fasa),
        )
        answers[name] = reply.choices[0].message.content
        [report] = reply.metadata["fasa"]
        assert report["sparse_steps"] == (5 if fasa else 0)
        assert report["dense_steps"] == (0 if fasa else 5)
    assert answers["dense"] == answers["covering"]


@pytest.mark.parametrize("place", PLACES)
def test_openai_completions_with_several_choices(client: openai.OpenAI, place: str) -> None:
    reply = client.completions.create(
        model="tiny",
        prompt=[PROMPT, "x = 1"],
        max_tokens=4,
        n=2,
        extra_body={**PLACES[place]({"budget": 64}), "ignore_eos": True},
    )
    assert len(reply.choices) == 4
    reports = reply.metadata["fasa"]
    assert [report["sparse_steps"] for report in reports] == [3] * 4
    assert [report["budget"] for report in reports] == [64] * 4


@pytest.mark.parametrize("place", PLACES)
def test_openai_streams(client: openai.OpenAI, place: str) -> None:
    """The chunk that carries the usage carries the report; no other chunk does."""
    for usage in (True, False):
        more: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
        arguments: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "stream": True, **more}
        extra = {**PLACES[place](True), "ignore_eos": True}
        for chunks in (
            client.chat.completions.create(messages=MESSAGES, extra_body=extra, **arguments),
            client.completions.create(prompt=PROMPT, extra_body=extra, **arguments),
        ):
            found = [(chunk.model_extra or {}).get("metadata") for chunk in chunks]
            reports = [metadata["fasa"] for metadata in found if metadata]
            assert len(reports) == usage
            if usage:
                [[report]] = reports
                assert report["sparse_steps"] == 5
                assert found[-1] is not None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_routes_refuse_before_the_first_chunk(
    client: openai.OpenAI, place: str, stream: bool
) -> None:
    extra = PLACES[place]({"budjet": 1})
    with pytest.raises(openai.BadRequestError, match="fasa has no key 'budjet'") as refused:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=stream, extra_body=extra
        )
    assert refused.value.body["code"] == 400
    with pytest.raises(openai.BadRequestError, match="fasa has no key 'budjet'"):
        client.completions.create(model="tiny", prompt=PROMPT, stream=stream, extra_body=extra)


def test_a_switch_given_twice_has_to_agree(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"fasa is given twice, as False .* as True"):
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            extra_body={"fasa": True, "custom_params": {"fasa": False}},
        )


@pytest.mark.parametrize("where", ["sampling_params", "body"])
def test_generate_takes_fasa_beside_custom_params(server: str, where: str) -> None:
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    body: dict[str, Any] = {"text": [PROMPT, "x = 1"], "sampling_params": params}
    (params if where == "sampling_params" else body)["fasa"] = {"budget": 64}
    response = httpx.post(f"{server}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    for reply in response.json():
        assert reply["meta_info"]["fasa"]["sparse_steps"] == 5
        assert reply["meta_info"]["fasa"]["budget"] == 64


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("custom_params", "message"),
    [
        ({"fasa": "yes"}, "fasa must be true, false or an object, got 'yes'"),
        ({"fasa": {"budjet": 1}}, "fasa has no key 'budjet', expected one of budget"),
        ({"fasa": {"budget": 36}}, "sink + recent + 1 = 37 to the server's max_budget = 1024"),
        ({"fasa": {"budget": 1025}}, "max_budget = 1024 tokens, got 1025"),
        ({"fasa": {"budget": {"tokens": 64}}}, "fasa.budget must be an integer"),
        ({"fasa": [1]}, "fasa must be true, false or an object"),
        ([1], "custom_params must be an object"),
    ],
    ids=str,
)
def test_bad_parameters_get_400_and_the_next_request_is_served(
    server: str, custom_params: Any, message: str, stream: bool
) -> None:
    response = generate(server, custom_params, stream=stream)
    assert message in response.text
    if not stream:
        assert response.status_code == 400
    assert generate(server, {"fasa": True}).status_code == 200
