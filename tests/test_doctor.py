"""``fasa doctor``: what it says when a hook could not be set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fasa_sglang.platforms import PLATFORM_NAME

# What Python does for a package that is not installed.
WITHOUT_JSONSCHEMA = """
import sys
sys.modules["jsonschema"] = None
from fasa_sglang.doctor import _hooks
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
