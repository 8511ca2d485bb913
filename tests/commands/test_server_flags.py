"""SGLang's flags as ``fasa serve`` reads them, with SGLang's own parser."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from fasa_sglang.commands.server_flags import FIELDS, ServerFlags
from serving import server_environment

# One process for all cases, because importing SGLang's parser takes seconds.
PARSE_ALL = """
import json, sys
from fasa_sglang.commands.server_flags import _server_flags
answers = []
for argv in json.load(sys.stdin):
    try:
        answers.append(_server_flags(argv))
    except ValueError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""
BASE: dict[str, Any] = {"host": "127.0.0.1", "port": 30000}
CONFIG_FILE = "attention-backend: triton\n"
ACCEPTED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "model alone": (["M"], {"model_path": "M", "argv": ["--model-path", "M"]}),
    "model last": (
        ["--tp-size", "2", "--port", "4", "M"],
        {
            "model_path": "M",
            "port": 4,
            "argv": ["--model-path", "M", *["--tp-size", "2", "--port", "4"]],
        },
    ),
    "model between": (
        ["--trust-remote-code", "M", "--revision=v2"],
        {"model_path": "M", "revision": "v2"},
    ),
    "model as flag": (
        ["--model-path", "M", "--load-format", "dummy"],
        {"model_path": "M", "load_format": "dummy"},
    ),
    "model like a value": (
        ["--served-model-name", "M", "--tp", "2", "M"],
        {
            "model_path": "M",
            "argv": [*["--model-path", "M", "--served-model-name", "M", "--tp", "2"]],
        },
    ),
    "overrides": (
        ["M", '--json-model-override-args={"a": 1}'],
        {"json_model_override_args": '{"a": 1}'},
    ),
}
REFUSED: dict[str, tuple[list[str], str]] = {
    "no model": (["--tp-size", "2"], "needs one model, got none; pass it as MODEL"),
    "two models": (["A", "--tp-size", "2", "B"], "needs one model, got A, B"),
    "two kinds of models": (["A", "--model-path", "B"], "needs one model, got A, B"),
    "typo": (["M", "--max-total-tokenz", "3"], "unrecognized arguments: --max-total-tokenz"),
    "bad value": (["M", "--tp-size", "two"], "--tensor-parallel-size: invalid int value: 'two'"),
    "config file": (["M", "--config", "CONFIG"], "got --attention-backend triton"),
    "missing config file": (["M", "--config", "/no/such.yaml"], "/no/such.yaml"),
    **{
        " ".join(flags): (["M", *flags], f"got {name} torch_native; leave the flag out")
        for name in ("--attention-backend", "--decode-attention-backend")
        for flags in ([name, "torch_native"], [f"{name}=torch_native"])
    },
    "abbreviation": (["M", "--attention-back", "triton"], "got --attention-backend triton"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("flags")
    config = folder / "config.yaml"
    config.write_text(CONFIG_FILE)
    cases = {name: argv for name, (argv, _) in {**ACCEPTED, **REFUSED}.items()}
    lists = [[str(config) if arg == "CONFIG" else arg for arg in argv] for argv in cases.values()]
    process = subprocess.run(
        [sys.executable, "-P", "-c", PARSE_ALL],
        input=json.dumps(lists),
        env=server_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return dict(zip(cases, json.loads(process.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", ACCEPTED)
def test_server_flags_find_the_model_wherever_it_is(
    answers: dict[str, dict[str, Any]], name: str
) -> None:
    assert "error" not in answers[name]
    assert set(answers[name]) == {"argv", *FIELDS}
    expected = ACCEPTED[name][1]
    assert {key: answers[name][key] for key in expected} == expected


@pytest.mark.parametrize("name", REFUSED)
def test_server_flags_that_cannot_work_are_refused_in_one_sentence(
    answers: dict[str, dict[str, Any]], name: str
) -> None:
    message = answers[name].get("error", "accepted")
    assert REFUSED[name][1] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({}, "http://127.0.0.1:30000"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:30000"),
        ({"host": "::", "port": 1}, "http://[::1]:1"),
        ({"host": "example.org", "ssl_certfile": "c"}, "https://example.org:30000"),
    ],
)
def test_url_is_the_address_that_this_machine_reaches(values: dict[str, Any], url: str) -> None:
    assert ServerFlags(**{**dict.fromkeys(["argv", *FIELDS]), **BASE, **values}).url == url
