"""Write files and folders so that no other process sees a half-written one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; move it to ``path`` when the block ends.

    If several processes write the same ``path``, the first one wins and the others drop their copy.
    If the block raises, nothing is left behind.

    Args:
        path: The file or folder to create; its parent folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        yield part
        if part.is_dir():
            try:
                part.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
        else:
            # Unlike a rename, a link never replaces what another process may be reading.
            with suppress(FileExistsError):
                path.hardlink_to(part)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
