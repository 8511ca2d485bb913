"""``fasa doctor``: hooks that cannot be set, and calibrations that do not fit or do not exist."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.cli import main
from fasa_sglang.commands.doctor import _configuration
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.names import PLATFORM_NAME
from fasa_sglang.own_command import own_command

# Python raises the same for this as for a package that is not installed.
WITHOUT_JSONSCHEMA = """
import sys
sys.modules["jsonschema"] = None
from fasa_sglang.commands.doctor import _hooks
_hooks()
"""


def test_hooks_that_cannot_be_set_name_the_missing_package(tmp_path: Path) -> None:
    """SGLang only reports that its module lacks the class, because it cannot import the module."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JSONSCHEMA],
        env={**os.environ, "SGLANG_PLATFORM": PLATFORM_NAME},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    [message] = [line for line in done.stderr.splitlines() if "errors.FasaError:" in line]
    assert "serving_chat.OpenAIServingChat._build_chat_response (import of jsonschema" in message
    assert "sglang.srt.managers" not in message, "only what is missing"


def doctor(
    tmp_path: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the command; returns the process and the table's rows by their first column."""
    process = subprocess.run(
        own_command("doctor", *arguments),
        env={
            **os.environ,
            "SGLANG_PLATFORM": PLATFORM_NAME,
            "XDG_CACHE_HOME": str(tmp_path),
            "COLUMNS": "400",
            **environment,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in process.stdout.splitlines() if "│" in line]
    return process, {line.split("│")[1].strip(): line for line in lines}


def test_doctor_with_a_calibration_of_another_rope_layout_refuses_it(
    tiny_path: Path, tiny_calibration: str, tmp_path: Path
) -> None:
    """The model is checked with the layout that the settings name."""
    process, rows = doctor(
        tmp_path,
        *("--model", str(tiny_path), "--calibration", tiny_calibration),
        FASA_CONFIG='{"rope_layout": "interleaved"}',
    )
    assert process.returncode == 1
    assert "8 of 16 chunks by deviation" in rows["configuration"]
    assert "interleaved False but the model has True" in rows["model"]
    assert process.stderr.endswith("a server would be refused because of: model\n")


def test_doctor_with_auto_looks_the_models_calibration_up(
    tiny_path: Path, tiny_calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first start there is none; a calibration need not say how it was made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ("--model", str(tiny_path), "--json", str(tmp_path / "report.json"))
    process, rows = doctor(tmp_path, *arguments, "--calibration", "auto")
    assert process.returncode == 0, process.stdout
    assert f"none yet, fasa serve {tiny_path} makes it at first start" in rows["configuration"]
    assert "16 frequency chunks" in rows["model"]
    assert '"what": "model"' in (tmp_path / "report.json").read_text()
    cached = cached_calibration(str(tiny_path))
    cached.parent.mkdir(parents=True)
    replace(DominantFCs.load(tiny_calibration), provenance={}).save(cached)
    process, rows = doctor(tmp_path, *arguments, FASA_CONFIG='{"calibration": "auto"}')
    assert process.returncode == 0, process.stdout
    assert f"{cached}: LlamaForCausalLM, 8 of 16 chunks (the file does" in rows["configuration"]


def test_doctor_with_an_unwritable_report_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "/nodir/x"]) == 1
    assert "there is no folder /nodir; create it first" in capsys.readouterr().err


def test_doctor_with_auto_and_no_model_says_what_is_missing() -> None:
    assert "auto; pass --model to look it up" in _configuration(None, "auto")
