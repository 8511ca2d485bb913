"""The FASA parameters that a request may have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.requests import (
    BEAM_SEARCH,
    OFF_BY_DEFAULT,
    OFF_FOR_REQUEST,
    FasaRequest,
    dense_reason,
    parse_request,
)

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
def test_parse_request_fills_in_server_settings(
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
def test_parse_request_refuses_bad_values_in_one_sentence(fasa: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_request({"fasa": fasa}, CONFIG, prompt_len=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("default", "prompt_len", "sparse"),
    [("off", 9999, False), ("on", 1, True), ("auto", 2047, False), ("auto", 2048, True)],
)
def test_parse_request_without_switch_follows_server_default(
    default: str, prompt_len: int, sparse: bool
) -> None:
    config = FasaConfig(default=default)
    assert (parse_request(None, config, prompt_len) is not None) == sparse
    assert parse_request({"fasa": False}, config, prompt_len) is None


@pytest.mark.parametrize("fasa", [True, {}, {"budget": 512}], ids=str)
def test_parse_request_refuses_beam_search(fasa: Any) -> None:
    with pytest.raises(RequestError, match="does not work with beam search; leave out fasa or bea"):
        parse_request({"fasa": fasa}, CONFIG, prompt_len=10, beam_search=True)


@pytest.mark.parametrize("default", ["off", "on", "auto"])
def test_parse_request_without_switch_keeps_beam_search_dense(default: str) -> None:
    config = FasaConfig(default=default)
    for params in (None, {"fasa": False}):
        assert parse_request(params, config, prompt_len=9999, beam_search=True) is None


@pytest.mark.parametrize("custom_params", [[1], "fasa", 1], ids=str)
def test_parse_request_refuses_params_that_are_not_an_object(custom_params: Any) -> None:
    """The scheduler gets them as they are on routes that bypass the tokenizer process."""
    with pytest.raises(RequestError, match="custom_params must be an object, got"):
        parse_request(custom_params, CONFIG, prompt_len=10)


SHORT = "shorter than min_seq_len = 2048 tokens"


@pytest.mark.parametrize(
    ("default", "custom_params", "beam_search", "expected"),
    [
        ("off", {"fasa": True}, False, SHORT),
        ("on", None, False, SHORT),
        ("off", {"fasa": False}, False, OFF_FOR_REQUEST),
        ("on", {"fasa": False}, True, OFF_FOR_REQUEST),
        ("off", None, False, OFF_BY_DEFAULT),
        ("off", {"fasa": None}, True, OFF_BY_DEFAULT),
        ("auto", None, False, f"the request does not set fasa and its prompt is {SHORT}"),
        ("on", None, True, BEAM_SEARCH),
    ],
    ids=str,
)
def test_dense_reason_names_what_keeps_a_step_dense(
    default: str, custom_params: Any, beam_search: bool, expected: str
) -> None:
    config = FasaConfig(default=default)
    request = parse_request(custom_params, config, 10, beam_search)
    assert dense_reason(request, custom_params, config, beam_search) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(["budget", "sink", "recent", "prefix", "prune", "budjet"])


@given(fasa=json_values | st.dictionaries(keys, json_values, max_size=4))
def test_parse_request_accepts_or_refuses_any_json(fasa: Any) -> None:
    try:
        request = parse_request({"fasa": fasa}, CONFIG, prompt_len=10)
    except RequestError as error:
        assert len(str(error)) < 400
        return
    assert request is None or request.sink + request.recent < request.budget <= CONFIG.max_budget
    json.dumps(fasa)


def test_parse_request_with_selector_any_takes_selector_of_request() -> None:
    server = FasaConfig(selector="any", seed=3)
    assert parse_request({"fasa": True}, server, 9) == FasaRequest(2048, 4, 32, seed=3)
    chosen = parse_request({"fasa": {"selector": "random", "seed": 5}}, server, 9)
    assert chosen is not None and (chosen.selector, chosen.seed) == ("random", 5)
    with pytest.raises(RequestError, match=r"fasa.selector must be one of fasa, .*'any'"):
        parse_request({"fasa": {"selector": "any"}}, server, 9)


def test_parse_request_with_fixed_selector_refuses_another() -> None:
    fixed = parse_request({"fasa": True}, FasaConfig(selector="quest"), 9)
    assert fixed is not None and fixed.selector == "quest"
    with pytest.raises(RequestError, match="fasa has no key 'selector'"):
        parse_request({"fasa": {"selector": "quest"}}, FasaConfig(), 9)
