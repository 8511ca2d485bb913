"""The scripts' environment: created and replaced only where the scripts created it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def source_environment(folder: Path) -> subprocess.CompletedProcess[str]:
    """Source the script with an interpreter that only creates an empty environment."""
    python = folder.parent / "python"
    python.write_text(
        '#!/bin/sh\nif [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
    )
    python.chmod(0o755)
    return subprocess.run(
        ["bash", "-c", ". scripts/environment.sh && echo $PATH"],
        cwd=ROOT,
        env={**os.environ, "FASA_VENV": str(folder), "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("content", ["bin/python", "pyvenv.cfg"])
def test_environment_of_somebody_else_is_refused_and_left_alone(
    tmp_path: Path, content: str
) -> None:
    folder = tmp_path / "venv"
    file = folder / content
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    process = source_environment(folder)
    assert process.returncode == 1
    assert process.stderr.strip() == (
        f"{folder} was not created by these scripts and is left alone; set FASA_VENV to another "
        "folder"
    )
    assert file.read_text() == "precious"


@pytest.mark.parametrize("stamp", [None, "", "incomplete", "sglang==0.0.1 123"])
def test_environment_of_ours_is_created_or_replaced(tmp_path: Path, stamp: str | None) -> None:
    """None is a missing folder and the empty stamp an empty folder."""
    folder = tmp_path / "venv"
    if stamp is not None:
        folder.mkdir()
    if stamp:
        (folder / "made-for").write_text(stamp)
        (folder / "old").touch()
    process = source_environment(folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"{folder}/bin:")
    assert (folder / "made-for").read_text().startswith("sglang==")
    assert not (folder / "old").exists()
    again = source_environment(folder)
    assert again.returncode == 0 and "creating" not in again.stderr
