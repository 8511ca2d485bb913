"""Write a file whole or not at all, and find out before the work whether it can be written."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from fasa_sglang.errors import FasaError

PART = ".part-"


def require_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before the work whose result it is for.

    Raises:
        FasaError: The path is a folder, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise FasaError(f"cannot write {path}: it is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise FasaError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees either all of it or what was there before.

    Raises:
        FasaError: The folder is not writable or the disk is full. Nothing is left behind.
    """
    part = _part(path)
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def remove_stale_parts(folder: Path) -> None:
    """Remove the partial files that killed processes of this machine left in a folder."""
    pattern = f".*{PART}{socket.gethostname()}-*"
    for part in folder.glob(pattern):
        pid = part.name.rpartition("-")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """A name that no other process uses, not even one of another container with the same pid."""
    return path.with_name(f".{path.name}{PART}{socket.gethostname()}-{os.getpid()}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cannot_write(path: Path, error: OSError) -> FasaError:
    return FasaError(
        f"cannot write {path} ({error.strerror or error}); choose a writable place with free space"
    )
