"""Malformed requests by the hundred: each is refused, and the server goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.requests import parse_request

KEYS = ("budget", "sink", "recent", "prefix", "prune", "budjet", "enable", "", "Budget")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["full", "select", "half", "off", "think", "true", "1024"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
SWITCHES = VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
CONFIG = FasaConfig(budget=128, max_budget=1024, min_seq_len=0)


def is_bad(asked: Any) -> bool:
    try:
        parse_request({"fasa": asked}, CONFIG, prompt_len=0)
    except RequestError:
        return True
    return False


def body(route: str, place: str, asked: Any, stream: bool) -> dict[str, Any]:
    placed = {"custom_params": {"fasa": asked}} if place == "custom_params" else {"fasa": asked}
    if route == "/generate":
        params: dict[str, Any] = {"max_new_tokens": 1}
        sent: dict[str, Any] = {"text": "x", "sampling_params": params, "stream": stream}
        (sent if place == "body" else params).update(placed)
        return sent
    sent = {"model": "tiny", "max_tokens": 1, "stream": stream, **placed}
    if route == "/v1/completions":
        return {**sent, "prompt": "x"}
    return {**sent, "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.slow
def test_malformed_requests_are_refused_and_the_server_goes_on(
    server: str, draw: Callable[[Any, Any], Any]
) -> None:
    count, sent = draw(200, 2000), 0
    with httpx.Client(base_url=server, timeout=60) as client:

        def is_alive() -> None:
            fine = body("/generate", "body", {"budget": 64}, stream=False)
            reply = client.post("/generate", json=fine)
            assert reply.status_code == 200, reply.text
            assert reply.json()["meta_info"]["fasa"]["budget"] == 64

        @settings(
            max_examples=count,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(
            route=st.sampled_from(["/generate", "/v1/completions", "/v1/chat/completions"]),
            place=st.sampled_from(["custom_params", "sampling_params", "body"]),
            stream=st.booleans(),
            asked=SWITCHES,
        )
        def refuse(route: str, place: str, stream: bool, asked: Any) -> None:
            nonlocal sent
            assume(is_bad(asked))
            reply = client.post(route, json=body(route, place, asked, stream))
            if route == "/generate" and stream:
                # SGLang has begun the stream by then; the error is all that it holds.
                assert reply.status_code < 500
                assert reply.text.count("data: ") == 2 and '"error"' in reply.text, reply.text
            else:
                assert reply.status_code == 400, reply.text
                assert "fasa" in reply.text
            sent += 1
            if sent % 100 == 0:
                is_alive()

        refuse()
        is_alive()
    assert sent >= count


def test_ten_megabytes_of_keys_are_refused_with_a_short_answer(server: str) -> None:
    many = {f"key{i}": i for i in range(700_000)}
    for asked in (many, {"k" * 10_000_000: 1}, "x" * 10_000_000):
        for route in ("/generate", "/v1/chat/completions"):
            sent = body(route, "custom_params", asked, stream=False)
            reply = httpx.post(f"{server}{route}", json=sent, timeout=120)
            assert reply.status_code == 400
            assert len(reply.text) < 2000
