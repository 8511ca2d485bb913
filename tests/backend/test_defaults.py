"""A server with default settings: only a calibration is set, and SGLang names the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sglang.srt.sampling.sampling_params import SamplingParams

from fasa_sglang.backend.served import launch_with_fixed_settings
from fasa_sglang.requests import OFF_BY_DEFAULT, OFF_FOR_REQUEST
from serving import running_server, server_command

SHORT = "shorter than min_seq_len = 2048 tokens"
needs_beam_search = pytest.mark.skipif(
    not hasattr(SamplingParams(), "beam_width"), reason="SGLang 0.5.17 has no beam search"
)


@pytest.fixture(scope="module")
def default_server(
    tiny_path: Path, tiny_calibration: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Its settings file is edited after the start and before the first request."""
    folder = tmp_path_factory.mktemp("default")
    settings = folder / "fasa.json"
    settings.write_text(json.dumps({"calibration": tiny_calibration}))
    # Without a warm-up, so that no request comes before the edit.
    command = server_command(tiny_path, None, "--enable-metrics", "--skip-server-warmup")
    with running_server(command, folder / "log", FASA_CONFIG=str(settings)) as url:
        edited = {"calibration": "/nowhere", "default": "on", "budget": 64, "max_budget": 64}
        settings.write_text(json.dumps({**edited, "min_seq_len": 0}))
        yield url


def generate(url: str, prompt_len: int, fasa: Any = None, **params: Any) -> Any:
    """Reply to a prompt of that many tokens, six new tokens long."""
    sampling_params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, **params}
    body = {"input_ids": list(range(100, 100 + prompt_len)), "sampling_params": sampling_params}
    if fasa is not None:
        body["fasa"] = fasa
    response = httpx.post(f"{url}/generate", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()


def test_settings_file_edited_after_start_changes_nothing(default_server: str) -> None:
    """The tokenizer process used to read it at its first request, with the edit."""
    report = generate(default_server, 20, {"budget": 4096})["meta_info"]["fasa"]
    assert report["budget"] == 4096
    assert generate(default_server, 20)["meta_info"]["fasa"]["dense_reason"] == OFF_BY_DEFAULT


@pytest.mark.parametrize(
    ("prompt_len", "fasa", "sparse_steps", "dense_reason"),
    [
        (20, True, 0, SHORT),
        (20, False, 0, OFF_FOR_REQUEST),
        (20, None, 0, OFF_BY_DEFAULT),
        (2100, True, 5, None),
        # The first decode step is at 2046 tokens, and the third at 2048.
        (2045, True, 3, SHORT),
    ],
)
def test_report_says_why_steps_were_dense(
    default_server: str, prompt_len: int, fasa: Any, sparse_steps: int, dense_reason: str | None
) -> None:
    report = generate(default_server, prompt_len, fasa)["meta_info"]["fasa"]
    ratio = report.pop("kv_read_ratio")
    assert report == {
        "sparse_steps": sparse_steps,
        "dense_steps": 5 - sparse_steps,
        "dense_reason": dense_reason,
        "budget": 2048 if fasa else None,
        "pruned_tokens": 0,
    }
    assert (ratio < 1) == (sparse_steps > 0)


def test_reply_without_decode_step_has_no_dense_reason(default_server: str) -> None:
    report = generate(default_server, 20, True, max_new_tokens=1)["meta_info"]["fasa"]
    assert (report["dense_steps"], report["dense_reason"]) == (0, None)


def test_metrics_carry_the_name_of_sglangs_metrics(default_server: str) -> None:
    generate(default_server, 20, True)
    text = httpx.get(f"{default_server}/metrics", timeout=60).text
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "model_name" in sample.labels:
                names[sample.name.startswith("sglang_fasa_")].add(sample.labels["model_name"])
    models = httpx.get(f"{default_server}/v1/models", timeout=60).json()["data"]
    assert names[True] == names[False] == {models[0]["id"]}


@needs_beam_search
def test_beam_search_without_fasa_is_served(default_server: str) -> None:
    reply = generate(default_server, 20, beam_width=2, n=2)
    assert len(reply["meta_info"]["beam_results"]) == 2
    assert reply["meta_info"]["fasa"]["sparse_steps"] == 0
    assert reply["meta_info"]["fasa"]["dense_reason"] == OFF_BY_DEFAULT
    assert generate(default_server, 20)["meta_info"]["completion_tokens"] == 6


@needs_beam_search
@pytest.mark.parametrize("beams_first", [True, False])
def test_beam_search_with_fasa_is_refused(default_server: str, beams_first: bool) -> None:
    pairs = [("beam_width", 2), ("fasa", True)]
    in_params = dict(pairs if beams_first else reversed(pairs))
    for body in (
        {"sampling_params": in_params},
        {"fasa": True, "sampling_params": dict(pairs[:1])},
    ):
        sent = {"text": "x = 1", **body}
        response = httpx.post(f"{default_server}/generate", json=sent, timeout=60)
        assert response.status_code == 400
        assert "fasa does not work with beam search" in response.json()["error"]["message"]


def test_processes_are_launched_with_the_content_of_a_settings_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fasa.json"
    path.write_text('{"budget": 512}\n')
    monkeypatch.setenv("FASA_CONFIG", str(path))
    assert launch_with_fixed_settings(lambda: os.environ["FASA_CONFIG"]) == '{"budget": 512}'
    assert os.environ["FASA_CONFIG"] == str(path)
    monkeypatch.setenv("FASA_CONFIG", "/no/such/file")
    assert launch_with_fixed_settings(lambda: os.environ["FASA_CONFIG"]) == "/no/such/file"
