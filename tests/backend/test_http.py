"""A real server over HTTP: what it serves, what it refuses, and that it survives refusals."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from fasa_sglang.backend.host import CHECKS_BODIES

PROMPT = "def add(a, b):\n" * 40


def generate(server: str, custom_params: Any, **more: Any) -> httpx.Response:
    params = {"temperature": 0, "max_new_tokens": 6, "custom_params": custom_params}
    body = {"text": PROMPT, "sampling_params": params, **more}
    return httpx.post(f"{server}/generate", json=body, timeout=120)


def test_generate_reports_steps_and_read_ratio(server: str) -> None:
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


def test_generate_stream_reports_in_last_chunk_only(server: str) -> None:
    """A report in every chunk would cost host time in every step, even without FASA."""
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


def test_generate_with_several_samples_reports_each(server: str) -> None:
    params = {"max_new_tokens": 4, "n": 3, "custom_params": {"fasa": True}}
    body = {"text": [PROMPT, "x = 1"], "sampling_params": params}
    replies = httpx.post(f"{server}/generate", json=body, timeout=120).json()
    assert len(replies) == 6
    assert all(isinstance(reply["meta_info"]["fasa"], dict) for reply in replies)


MESSAGES = [{"role": "user", "content": PROMPT}]
# Where an HTTP client may write the switch.
PLACES = {
    "custom_params": lambda fasa: {"custom_params": {"fasa": fasa}},
    "top level": lambda fasa: {"fasa": fasa},
    "both": lambda fasa: {"fasa": fasa, "custom_params": {"fasa": fasa, "other": 1}},
}


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("place", PLACES)
def test_chat_reports_and_covering_budget_equals_dense(client: openai.OpenAI, place: str) -> None:
    """A reply with a budget that covers all tokens equals the dense reply."""
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
def test_completions_with_several_choices_report_each(client: openai.OpenAI, place: str) -> None:
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
def test_openai_stream_reports_in_usage_chunk_only(client: openai.OpenAI, place: str) -> None:
    """Clients that do not request the usage chunk do not expect a chunk without choices."""
    for usage in (True, False):
        more: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
        arguments: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "stream": True, **more}
        extra = {**PLACES[place](True), "ignore_eos": True}
        for chunks in (
            client.chat.completions.create(messages=MESSAGES, extra_body=extra, **arguments),
            client.completions.create(prompt=PROMPT, extra_body=extra, **arguments),
        ):
            metadata = [(chunk.model_extra or {}).get("metadata") for chunk in chunks]
            reports = [entry["fasa"] for entry in metadata if entry]
            assert len(reports) == usage
            if usage:
                [[report]] = reports
                assert report["sparse_steps"] == 5
                assert metadata[-1] is not None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_routes_refuse_before_first_chunk(
    client: openai.OpenAI, place: str, stream: bool
) -> None:
    extra = PLACES[place]({"budjet": 1})
    with pytest.raises(openai.BadRequestError, match="fasa has no key 'budjet'") as refused:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=stream, extra_body=extra
        )
    assert refused.value.body["code"] == 400
    # Where OpenAI's client for JavaScript looks, and where SGLang writes.
    body = refused.value.response.json()
    assert body["error"]["message"] == body["message"]
    assert body["object"] == "error"
    with pytest.raises(openai.BadRequestError, match="fasa has no key 'budjet'"):
        client.completions.create(model="tiny", prompt=PROMPT, stream=stream, extra_body=extra)


def test_completions_stream_orders_reports_by_choice(client: openai.OpenAI) -> None:
    """The second choice stops first, so the order of finishing is not the order of choices."""
    prompts = [PROMPT, "x = 1"]
    more: dict[str, Any] = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 24}
    more["extra_body"] = {"fasa": {"budget": 64}, "ignore_eos": True}
    long, short = (choice.text for choice in client.completions.create(**more).choices)
    ends = (short[i : i + 6] for i in range(len(short) - 6))
    more["stop"] = next(end for end in ends if end not in long and "\ufffd" not in end)
    whole = client.completions.create(**more).metadata["fasa"]
    chunks = client.completions.create(**more, stream=True, stream_options={"include_usage": True})
    *_, last = chunks
    assert whole[0]["sparse_steps"] == 23 > whole[1]["sparse_steps"]
    assert last.model_extra["metadata"]["fasa"] == whole
    several = client.completions.create(
        **{**more, "n": 2, "stop": None}, stream=True, stream_options={"include_usage": True}
    )
    *_, last = several
    ratios = [report["kv_read_ratio"] for report in last.model_extra["metadata"]["fasa"]]
    assert len(ratios) == 4
    assert ratios[0] == ratios[1] < ratios[2] == ratios[3]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The payloads of a stream of server-sent events."""
    lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("place", PLACES)
def test_responses_api_reports_whole_and_streamed(server: str, place: str) -> None:
    body = {"model": "tiny", "input": PROMPT, "max_output_tokens": 6, **PLACES[place](True)}
    reply = httpx.post(f"{server}/v1/responses", json=body, timeout=120).json()
    [report] = reply["metadata"]["fasa"]
    usage = reply["usage"]
    # SGLang 0.5.17 has the name of the chat API.
    num_tokens = usage.get("output_tokens", usage.get("completion_tokens"))
    assert report["sparse_steps"] == num_tokens - 1 > 0
    url = f"{server}/v1/responses"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=120) as response:
        *others, last = events(response)
    assert last["type"] in ("response.completed", "response.incomplete")
    [report] = last["response"]["metadata"]["fasa"]
    assert report["sparse_steps"] > 0
    assert not any((event.get("response") or {}).get("metadata") for event in others)


@pytest.mark.parametrize("place", PLACES)
def test_messages_api_reports_whole_and_streamed(server: str, place: str) -> None:
    url = f"{server}/v1/messages"
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, **PLACES[place](True)}
    reply = httpx.post(url, json=body, timeout=120).json()
    [report] = reply["metadata"]["fasa"]
    assert report["sparse_steps"] == reply["usage"]["output_tokens"] - 1 > 0
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=120) as response:
        reported = [event for event in events(response) if "metadata" in event]
    [event] = reported
    assert event["type"] == "message_delta"
    assert event["metadata"]["fasa"][0]["sparse_steps"] > 0


ROUTES: dict[str, dict[str, Any]] = {
    "/generate": {"text": PROMPT},
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES},
    "/v1/completions": {"model": "tiny", "prompt": PROMPT},
    "/v1/responses": {"model": "tiny", "input": PROMPT},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES, "max_tokens": 6},
    "/api/chat": {"model": "tiny", "messages": MESSAGES},
    "/api/generate": {"model": "tiny", "prompt": PROMPT},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_refuses_bad_and_misplaced_switches(
    server: str, route: str, stream: bool
) -> None:
    """``extra_body`` is an argument of Python's client; others send it as an unknown field."""

    def send(**more: Any) -> httpx.Response:
        body = {**ROUTES[route], "stream": stream, **more}
        return httpx.post(f"{server}{route}", json=body, timeout=120)

    cases: list[tuple[dict[str, Any], str]] = [
        ({"fasa": {"budjet": 1}}, "fasa has no key 'budjet'"),
        ({"custom_params": {"fasa": {"budjet": 1}}}, "fasa has no key 'budjet'"),
        ({"extra_body": {"fasa": True}}, "fasa inside extra_body would be ignored; write it at"),
        (
            {"extra_body": {"custom_params": {"fasa": True}}},
            "fasa inside extra_body would be ignored",
        ),
    ]
    for more, message in cases:
        response = send(**more)
        assert message in response.text, response.text
        # SGLang begins a stream of /generate before it looks at the request.
        assert response.status_code == (200 if stream and route == "/generate" else 400)
    if route == "/api/chat" and not CHECKS_BODIES:
        return  # SGLang 0.5.17 cannot serve this route with transformers 5.
    assert send(extra_body={"other": 1}).status_code == 200


def test_switch_given_twice_with_different_values_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"fasa is given twice, as False .* as True"):
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            extra_body={"fasa": True, "custom_params": {"fasa": False}},
        )


@pytest.mark.parametrize("where", ["sampling_params", "body"])
def test_generate_accepts_fasa_outside_custom_params(server: str, where: str) -> None:
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
        ({"fasa": {"prune": "think"}}, "needs to know where thinking ends"),
        ([1], "custom_params must be an object"),
    ],
    ids=str,
)
def test_bad_parameters_get_400_and_next_request_is_served(
    server: str, custom_params: Any, message: str, stream: bool
) -> None:
    response = generate(server, custom_params, stream=stream)
    assert message in response.text
    if not stream:
        assert response.status_code == 400
    assert generate(server, {"fasa": True}).status_code == 200
