"""What a request may ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.requests import FasaRequest, parse_request

CONFIG = FasaConfig()


@pytest.mark.parametrize(
    ("custom_params", "expected"),
    [
        (None, None),
        ({}, None),
        ({"other": 1}, None),
        ({"fasa": None}, None),
        ({"fasa": False}, None),
        ({"fasa": True}, FasaRequest(2048, 4, 32)),
        ({"fasa": {}}, FasaRequest(2048, 4, 32)),
        ({"fasa": {"budget": 37}}, FasaRequest(37, 4, 32)),
        ({"fasa": {"budget": 1, "sink": 0, "recent": 0}}, FasaRequest(1, 0, 0)),
        ({"fasa": {"prefix": "full", "prune": "off"}}, FasaRequest(2048, 4, 32, "full")),
    ],
    ids=str,
)
def test_parse_request_fills_in_the_servers_settings(
    custom_params: Any, expected: FasaRequest | None
) -> None:
    assert parse_request(custom_params, CONFIG, prompt_len=10) == expected


@pytest.mark.parametrize(
    ("fasa", "message"),
    [
        ("yes", "fasa must be true, false or an object, got 'yes'"),
        (1, "fasa must be true, false or an object, got 1"),
        ([True], "fasa must be true, false or an object"),
        ({"budjet": 1}, "fasa has no key 'budjet', expected one of budget, sink, recent, prefix"),
        ({"budget": 36}, r"fasa.budget must be from sink \+ recent \+ 1 = 37 .* got 36"),
        ({"budget": 0}, "fasa.budget must be an integer of at least 1, got 0"),
        ({"budget": 4097}, "max_budget = 4096 tokens, got 4097"),
        ({"budget": "512"}, "fasa.budget must be an integer of at least 1, got '512'"),
        ({"budget": 512.0}, "fasa.budget must be an integer"),
        ({"budget": True}, "fasa.budget must be an integer"),
        ({"budget": {"tokens": 512}}, "fasa.budget must be an integer"),
        ({"sink": -1}, "fasa.sink must be an integer of at least 0, got -1"),
        ({"recent": -1}, "fasa.recent must be an integer of at least 0, got -1"),
        ({"prefix": "half"}, "fasa.prefix must be one of select, full, got 'half'"),
        ({"prune": "all"}, "fasa.prune must be one of off, think, generated, got 'all'"),
        ({"prune_budget": 0}, "fasa.prune_budget must be an integer of at least 1, got 0"),
        (
            {"prune": "think", "prune_budget": 323},
            "fasa.prune_budget must be at least 324, the sum of sink, prune_recent and prune_g",
        ),
    ],
    ids=str,
)
def test_bad_requests_are_refused_in_one_sentence(fasa: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_request({"fasa": fasa}, CONFIG, prompt_len=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("default", "prompt_len", "sparse"),
    [("off", 9999, False), ("on", 1, True), ("auto", 2047, False), ("auto", 2048, True)],
)
def test_servers_default_decides_for_requests_that_do_not_ask(
    default: str, prompt_len: int, sparse: bool
) -> None:
    config = FasaConfig(default=default)
    assert (parse_request(None, config, prompt_len) is not None) == sparse
    assert parse_request({"fasa": False}, config, prompt_len) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(["budget", "sink", "recent", "prefix", "prune", "budjet"])


@given(fasa=json_values | st.dictionaries(keys, json_values, max_size=4))
def test_any_json_is_parsed_or_refused(fasa: Any) -> None:
    try:
        request = parse_request({"fasa": fasa}, CONFIG, prompt_len=10)
    except RequestError as error:
        assert len(str(error)) < 400
        return
    assert request is None or request.sink + request.recent < request.budget <= CONFIG.max_budget
    json.dumps(fasa)


def test_a_comparison_server_lets_requests_choose_their_selector() -> None:
    server = FasaConfig(selector="any", seed=3)
    assert parse_request({"fasa": True}, server, 9) == FasaRequest(2048, 4, 32, seed=3)
    asked = {"fasa": {"selector": "random", "seed": 5}}
    chosen = parse_request(asked, server, 9)
    assert chosen is not None and (chosen.selector, chosen.seed) == ("random", 5)
    with pytest.raises(RequestError, match=r"fasa.selector must be one of fasa, oracle, .*'any'"):
        parse_request({"fasa": {"selector": "any"}}, server, 9)


def test_other_servers_have_one_selector_for_all() -> None:
    fixed = parse_request({"fasa": True}, FasaConfig(selector="quest"), 9)
    assert fixed is not None and fixed.selector == "quest"
    with pytest.raises(RequestError, match="fasa has no key 'selector'"):
        parse_request({"fasa": {"selector": "quest"}}, FasaConfig(), 9)
