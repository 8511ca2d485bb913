"""The server's settings: which source wins, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasa_sglang.config import ENV, FasaConfig, check_keys
from fasa_sglang.errors import ConfigError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)


def test_load_explicit_settings_win_over_environment_and_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ENV, '{"budget": 100, "sink": 7}')
    config = FasaConfig.load({"budget": 200})
    assert (config.budget, config.sink, config.recent) == (200, 7, 32)


def test_load_with_a_file_in_the_environment_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "fasa.json"
    path.write_text(json.dumps({"selector": "quest"}))
    monkeypatch.setenv(ENV, str(path))
    assert FasaConfig.load().selector == "quest"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budjet": 1}, "unknown setting 'budjet'.*expected one of calibration.*budget"),
        ({"budget": 36}, r"sink \+ recent \+ 1 = 37 .*got 36"),
        ({"budget": 5000}, "max_budget = 4096 tokens, got 5000"),
        ({"budget": 2048.0}, "budget must be an integer"),
        ({"budget": True}, "budget must be an integer"),
        ({"recent": -1}, "recent must be an integer of at least 0, got -1"),
        ({"num_fcs": 0}, "num_fcs must be an integer of at least 1, got 0"),
        ({"num_fcs": "8"}, "num_fcs must be an integer"),
        ({"selector": "best"}, "selector must be one of fasa, .*got 'best'"),
        ({"combine": "max"}, "combine must be one of nrm, mean, got 'max'"),
        ({"label_dtype": "int2"}, "label_dtype must be one of"),
        ({"default": True}, "default must be one of off, on, auto, got True"),
        ({"calibration": 3}, "calibration must be 'auto' or the path of a file, got 3"),
        ({"calibration": ""}, "calibration must be 'auto' or the path of a file, got ''"),
        ({"selector": "x" * 9999}, "selector must be one of .{,300}$"),
        ([1], "must be a JSON object"),
        ("x", "must be a JSON object"),
    ],
    ids=str,
)
def test_load_of_a_bad_setting_is_refused_in_one_sentence(settings: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        FasaConfig.load(settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/no/such/file.json", "path of a readable JSON file, got '/no/such/file.json'"),
        ('{"budget": ', "does not hold valid JSON"),
        ('{"budjet": 1}', "unknown setting 'budjet' in FASA_CONFIG"),
        ('{"budget": ' + "[" * 99_999 + "]" * 99_999 + "}", "does not hold valid JSON"),
        ('{"budget": ' + "9" * 9999 + "}", "does not hold valid JSON"),
        ("/" + 5000 * "x", "readable JSON file, got .{,300}$"),
    ],
    ids=["missing", "invalid", "unknown", "nested", "digits", "long"],
)
def test_load_of_an_unreadable_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv(ENV, value)
    with pytest.raises(ConfigError, match=message):
        FasaConfig.load()


def test_load_of_a_binary_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv(ENV, str(path))
    with pytest.raises(ConfigError, match="path of a readable JSON file"):
        FasaConfig.load()


def test_check_keys_names_the_source_of_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'bugdet' in --settings"):
        check_keys({"bugdet": 1}, "--settings")
