"""Hundreds of malformed requests: each is refused, and the server keeps serving."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
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
BEAM_SEARCH = find_spec("sglang.srt.beam_search") is not None
CONFIG = FasaConfig(budget=128, max_budget=1024, min_seq_len=0)


def is_malformed(fasa: Any) -> bool:
    try:
        parse_request({"fasa": fasa}, CONFIG, prompt_len=0)
    except RequestError:
        return True
    return False


def body(route: str, place: str, fasa: Any, stream: bool) -> dict[str, Any]:
    """The JSON body of a request with ``fasa`` in one of the places where it may stand."""
    switch = {"custom_params": {"fasa": fasa}} if place == "custom_params" else {"fasa": fasa}
    if route == "/generate":
        params: dict[str, Any] = {"max_new_tokens": 1}
        fields: dict[str, Any] = {"text": "x", "sampling_params": params, "stream": stream}
        (fields if place == "body" else params).update(switch)
        return fields
    fields = {"model": "tiny", "max_tokens": 1, "stream": stream, **switch}
    if route == "/v1/completions":
        return {**fields, "prompt": "x"}
    return {**fields, "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.slow
def test_malformed_requests_on_every_route_are_refused_and_the_server_keeps_serving(
    server: str, draw: Callable[[Any, Any], Any]
) -> None:
    count, sent = draw(200, 2000), 0
    with httpx.Client(base_url=server, timeout=60) as client:

        def check_alive() -> None:
            valid = body("/generate", "body", {"budget": 64}, stream=False)
            reply = client.post("/generate", json=valid)
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
            fasa=SWITCHES,
        )
        def refuse(route: str, place: str, stream: bool, fasa: Any) -> None:
            nonlocal sent
            assume(is_malformed(fasa))
            reply = client.post(route, json=body(route, place, fasa, stream))
            if route == "/generate" and stream:
                # SGLang has already begun the stream, so the error is its only message.
                assert reply.status_code < 500
                assert reply.text.count("data: ") == 2 and '"error"' in reply.text, reply.text
            else:
                assert reply.status_code == 400, reply.text
                assert "fasa" in reply.text
            sent += 1
            if sent % 100 == 0:
                check_alive()

        refuse()
        check_alive()
    assert sent >= count


def test_ten_megabytes_of_fasa_are_refused_with_a_short_answer(server: str) -> None:
    many_keys = {f"key{i}": i for i in range(700_000)}
    for fasa in (many_keys, {"k" * 10_000_000: 1}, "x" * 10_000_000):
        for route in ("/generate", "/v1/chat/completions"):
            request = body(route, "custom_params", fasa, stream=False)
            reply = httpx.post(f"{server}{route}", json=request, timeout=120)
            assert reply.status_code == 400
            assert len(reply.text) < 2000


@pytest.mark.skipif(not BEAM_SEARCH, reason="this SGLang has no beam search")
def test_beam_search_over_http_is_answered_and_the_server_keeps_serving(server: str) -> None:
    params = {"beam_width": 2, "n": 2, "max_new_tokens": 8}
    request = {"text": "Once upon a time", "sampling_params": params}
    replies = [httpx.post(f"{server}/generate", json=request, timeout=60) for _ in range(2)]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert len(reply.json()["meta_info"]["beam_results"]) == 2
    assert replies[0].json()["text"] == replies[1].json()["text"]
