"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasa_sglang.workloads.publish import published


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_published_if_another_process_is_first_keeps_its_copy(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "cache" / "entry"

    def write(target: Path, content: str) -> None:
        if kind == "folder":
            target.mkdir()
            target /= "content"
        target.write_text(content)

    with published(path) as part:
        write(part, "second")
        assert not path.exists()
        write(path, "first")
    assert (path / "content" if kind == "folder" else path).read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_published_if_the_block_raises_leaves_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "entry"
    with pytest.raises(OSError, match="disk full"), published(path) as part:
        part.mkdir() if kind == "folder" else part.write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_published_moves_the_finished_file(tmp_path: Path) -> None:
    with published(tmp_path / "entry") as part:
        part.write_text("whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]
