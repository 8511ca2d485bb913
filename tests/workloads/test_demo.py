"""The demo's own checks; ``scripts/demo.sh`` runs the demo itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.cli import main
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads import demo


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
