"""The demo's calibration and its own checks; ``scripts/demo.sh`` runs the demo itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.cli import main
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads import demo


def test_demo_calibrates_each_model_once_into_a_file_of_its_own(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All models used to share one file, which two demos could overwrite for each other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log = Console(stderr=True)
    path = demo._calibration(str(tiny_path), log)
    assert path == cached_calibration(str(tiny_path))
    assert DominantFCs.load(path).model.num_layers == 2
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(demo, "calibrate", lambda *args, **kwargs: pytest.fail("calibrated again"))
    assert demo._calibration(str(tiny_path), log) == path


def test_demo_with_a_prompt_beyond_the_context_is_refused(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", str(tiny_path), "--prompt-tokens", "4000"]) == 1
    assert "do not fit the model's context of 4096 tokens" in capsys.readouterr().err


def rows(**changes: Any) -> list[dict[str, Any]]:
    row = {"sparse_steps": 5, "cached_tokens": 0, "answer": "48213"}
    return [row, row, {**row, "cached_tokens": 90, "answer": changes.pop("warm", "48213")}, row]


def test_require_sparse_and_exact_names_what_did_not_work() -> None:
    demo.require_sparse_and_exact(rows())
    with pytest.raises(FasaError, match="answered 'no' with the prefix cache and '48213' without"):
        demo.require_sparse_and_exact(rows(warm="no"))
    for index, key, value, message in (
        (1, "sparse_steps", 0, "no sparse step"),
        (2, "cached_tokens", 0, "reused nothing from the prefix cache"),
        (3, "cached_tokens", 7, "the cold run reused 7 tokens"),
    ):
        broken = rows()
        broken[index] = {**broken[index], key: value}
        with pytest.raises(FasaError, match=message):
            demo.require_sparse_and_exact(broken)
