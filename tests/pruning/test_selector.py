"""Pruning follows FASA's selections, so it is refused with another selector."""

from __future__ import annotations

import pytest

from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.requests import parse_request
from fasa_sglang.selectors import SELECTORS

PRUNE = {"prune": "generated"}


@pytest.mark.parametrize("selector", sorted(set(SELECTORS) - {"fasa"}))
def test_parse_request_refuses_pruning_with_a_comparison_selector(selector: str) -> None:
    with pytest.raises(RequestError, match="prune_rule"):
        parse_request({"fasa": PRUNE}, FasaConfig(selector=selector), 100)
    with pytest.raises(RequestError, match=f"got '{selector}'"):
        parse_request({"fasa": {**PRUNE, "selector": selector}}, FasaConfig(selector="any"), 100)
    assert parse_request({"fasa": True}, FasaConfig(selector=selector), 100) is not None


def test_parse_request_accepts_pruning_with_the_fasa_selector() -> None:
    for config in (FasaConfig(), FasaConfig(selector="any")):
        request = parse_request({"fasa": PRUNE}, config, 100)
        assert request is not None and request.prune == "generated"
