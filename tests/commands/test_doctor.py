"""``fasa doctor``: what it says when a hook could not be set, or a calibration does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fasa_sglang.own_command import own_command
from fasa_sglang.names import PLATFORM_NAME

# What Python does for a package that is not installed.
WITHOUT_JSONSCHEMA = """
import sys
sys.modules["jsonschema"] = None
from fasa_sglang.commands.doctor import _hooks
_hooks()
"""


def test_a_hook_that_cannot_be_set_names_the_package_that_is_missing(tmp_path: Path) -> None:
    """SGLang says that its module lacks the class, for it cannot import the module.

    Seen where an environment was put together by hand: the message blamed SGLang's version.
    """
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JSONSCHEMA],
        env={**os.environ, "SGLANG_PLATFORM": PLATFORM_NAME},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    [said] = [line for line in done.stderr.splitlines() if "errors.FasaError:" in line]
    assert "serving_chat.OpenAIServingChat._build_chat_response (import of jsonschema" in said
    assert "sglang.srt.managers" not in said, "only what is missing"


def test_a_calibration_of_another_rope_layout_is_refused(
    tiny_path: Path, tiny_calibration: str, tmp_path: Path
) -> None:
    """The layout that the settings name is the one that is checked."""
    done = subprocess.run(
        own_command("doctor", "--model", str(tiny_path), "--calibration", tiny_calibration),
        env={
            **os.environ,
            "SGLANG_PLATFORM": PLATFORM_NAME,
            "FASA_CONFIG": '{"rope_layout": "interleaved"}',
            "COLUMNS": "300",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if "│" in line}
    assert "8 of 16 chunks by deviation" in lines["configuration"]
    assert "interleaved False but the model has True" in lines["model"]
    assert done.stderr.endswith("would not serve here because of: model\n")
