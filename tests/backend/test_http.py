"""A real server over HTTP: what it serves, what it refuses, and that it goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fasa_sglang.platforms import PLATFORM_NAME

PROMPT = "def add(a, b):\n" * 40


def server_command(model: Path, settings: dict[str, Any] | None, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--attention-backend", "fasa", "--dtype", "float32", "--device", "cpu"]
    command += ["--cuda-graph-backend-decode", "disabled"]
    command += ["--cuda-graph-backend-prefill", "disabled", "--sampling-backend", "pytorch"]
    command += ["--grammar-backend", "none", "--max-total-tokens", "6000"]
    command += ["--mem-fraction-static", "0.3", "--served-model-name", "tiny"]
    if settings is not None:
        command += ["--json-model-override-args", json.dumps({"fasa": settings})]
    return [*command, *flags]


def server_environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "SGLANG_PLATFORM": PLATFORM_NAME, "OMP_NUM_THREADS": "1", **changes}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(
    tiny_path: Path, tiny_calibration: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    port = free_port()
    settings = {
        "calibration": tiny_calibration,
        "min_seq_len": 0,
        "max_budget": 1024,
        "budget": 128,
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            server_command(tiny_path, settings, "--port", str(port)),
            env=server_environment(),
            # Not the checkout, whose folders would hide the installed package.
            cwd=log.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(1)
            else:
                pytest.fail(f"the server did not come up: {log.read_text()[-3000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(60)


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


def test_openai_chat_takes_custom_params(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    answers = {}
    for name, fasa in (("dense", False), ("covering", {"budget": 1024})):
        reply = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": PROMPT}],
            temperature=0,
            max_tokens=6,
            extra_body={"custom_params": {"fasa": fasa}},
        )
        answers[name] = reply.choices[0].message.content
    assert answers["dense"] == answers["covering"]
    with pytest.raises(openai.BadRequestError, match="fasa has no key 'budjet'"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": PROMPT}],
            extra_body={"custom_params": {"fasa": {"budjet": 1}}},
        )


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
