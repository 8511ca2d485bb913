"""Rows carry the identity of the server that decoded them, not the client's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.calibration_file import FORMAT
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval import server_identity
from fasa_sglang.workloads.eval.server_identity import of_running_server, of_started_server
from fasa_sglang.workloads.eval.settings import parse_settings

URL = "http://server:1"
FASA = parse_settings("fasa", "64")
QUEST = parse_settings("quest", "64")


def report(monkeypatch: pytest.MonkeyPatch, backend: str = "fasa", **fasa: Any) -> None:
    """Answer as a server with these settings does."""
    info = {
        "attention_backend": backend,
        "json_model_override_args": json.dumps({"fasa": fasa}),
        "version": "0.5.99",
    }
    monkeypatch.setattr(server_identity, "server_info", lambda url: info)
    monkeypatch.setattr(server_identity, "server_device", lambda url: "NVIDIA X")


def test_of_running_server_reports_its_device_version_settings_and_calibration(
    monkeypatch: pytest.MonkeyPatch, tiny_path: Path, tmp_path: Path
) -> None:
    """The client's own GPU, SGLang and claims used to be recorded instead."""
    calibration = tmp_path / "own.safetensors"
    calibration.write_bytes(b"calibration")
    report(monkeypatch, combine="mean", calibration=str(calibration), budget=77)
    conditions = of_running_server(URL, str(tiny_path), FASA)
    assert conditions["device"] == "NVIDIA X" and conditions["sglang"] == "0.5.99"
    server = conditions["server"]
    assert server["combine"] == "mean" and server["label_dtype"] == "fp8"
    assert "budget" not in server, "every request sets it"
    assert (
        conditions["calibration"]
        == of_started_server(str(tiny_path), {"calibration": str(calibration)})["calibration"]
    )
    report(monkeypatch, calibration="/on/another/machine")
    conditions = of_running_server(URL, str(tiny_path), FASA)
    assert conditions["calibration"] == "not readable here: /on/another/machine"
    cached = cached_calibration(str(tiny_path))
    report(monkeypatch, calibration=f"/elsewhere/{cached.name}")
    conditions = of_running_server(URL, str(tiny_path), FASA)
    assert conditions["calibration"] == f"cached, format {FORMAT}"


def test_of_started_server_equals_the_same_server_running(
    monkeypatch: pytest.MonkeyPatch, tiny_path: Path
) -> None:
    """An interrupted evaluation can continue on a server that was started by hand."""
    report(monkeypatch, min_seq_len=0, selector="any", think_end_ids=[7])
    running = of_running_server(URL, str(tiny_path), FASA)
    started = of_started_server(
        str(tiny_path), {"min_seq_len": 0, "max_budget": 8192, "think_end_ids": [7]}
    )
    assert running["server"] == started["server"]
    assert running["calibration"] == started["calibration"]


@pytest.mark.parametrize(
    ("backend", "selector", "settings", "message"),
    [
        ("flashinfer", "fasa", FASA, "runs the attention backend flashinfer, expected fasa"),
        ("fasa", "fasa", QUEST, "has the selector 'fasa', expected 'any' for these"),
        ("fasa", "quest", FASA, "has the selector 'quest', expected 'any' or 'fasa'"),
    ],
)
def test_of_running_server_that_cannot_decode_the_settings_raises(
    monkeypatch: pytest.MonkeyPatch,
    tiny_path: Path,
    backend: str,
    selector: str,
    settings: Any,
    message: str,
) -> None:
    report(monkeypatch, backend, selector=selector)
    with pytest.raises(FasaError, match=message):
        of_running_server(URL, str(tiny_path), settings)


def test_of_started_server_with_a_missing_calibration_raises(tiny_path: Path) -> None:
    with pytest.raises(FasaError, match="cannot read the calibration /no/such/file"):
        of_started_server(str(tiny_path), {"calibration": "/no/such/file"})
