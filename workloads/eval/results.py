"""Rows of an evaluation on disk.

A folder belongs to one task under one set of conditions. Rows are appended as samples finish, so
that an interrupted run loses nothing, and a rerun skips the rows that exist.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fasa_sglang.errors import FasaError

CONDITIONS, ROWS, SUMMARY = "conditions.json", "rows.jsonl", "summary.json"


@dataclass(frozen=True)
class Row:
    """One sample decoded in one setting.

    Args:
        sample: Name of the sample; equal names have the same prompt.
        setting: ``Setting.name``.
        metrics: The task's metrics.
        info: Properties of the sample, such as its length or the depth of its needle.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the reply.
        kv_read_ratio: KV rows attended over those of dense decoding; None if not reported.
        seconds: Time of the request, if all requests in flight had the same setting; else 0.
        text: The reply, truncated.
    """

    sample: str
    setting: str
    metrics: dict[str, float]
    info: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    kv_read_ratio: float | None = None
    seconds: float = 0.0
    text: str = ""


class Results:
    """A results folder.

    Args:
        folder: Created if it does not exist.
        conditions: Everything that the rows depend on, as JSON values.

    Raises:
        FasaError: The folder is not readable or has rows of other conditions.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any]) -> None:
        self.folder, self.conditions = folder, dict(conditions)
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONDITIONS
        if path.exists():
            difference = describe_difference(_read_json(path), self.conditions)
            if difference:
                raise FasaError(
                    f"{folder} has results of other conditions ({difference}); give another --out"
                )
        else:
            path.write_text(json.dumps(self.conditions, indent=2) + "\n")
        self.rows = read_rows(folder)
        self._file = (folder / ROWS).open("a")

    def add(self, row: Row) -> None:
        """Append a row; it is on disk when this returns."""
        with self._lock:
            self.rows.append(row)
            self._file.write(json.dumps(asdict(row)) + "\n")
            self._file.flush()

    def find(self, sample: str, setting: str) -> Row | None:
        """The row of a sample in a setting, if it exists."""
        return next(
            (row for row in self.rows if (row.sample, row.setting) == (sample, setting)), None
        )

    def close(self) -> None:
        """Close the file of the rows."""
        self._file.close()


def folder_name(task: str, model: str, conditions: Mapping[str, Any]) -> str:
    """A name that differs between conditions: task, model and a hash."""
    text = json.dumps(conditions, sort_keys=True)
    return f"{task}-{Path(model).name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder; an incomplete last line, left by a crash, is removed.

    Raises:
        FasaError: A line is not a row.
    """
    path = folder / ROWS
    if not path.exists():
        return []
    rows = []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise FasaError(f"line {number} of {path} is not a results row ({error})") from error
    return rows


def read_conditions(folder: Path) -> dict[str, Any]:
    """The conditions of a results folder.

    Raises:
        FasaError: The folder has none.
    """
    return _read_json(folder / CONDITIONS)


def require_same_conditions(folders: Sequence[Path], ignored: Sequence[str]) -> None:
    """Refuse to relate rows that were measured under different conditions.

    Args:
        folders: Results folders; all are compared with the first.
        ignored: Conditions that may differ.

    Raises:
        FasaError: Names the conditions that differ.
    """
    first, *others = (
        {key: value for key, value in read_conditions(folder).items() if key not in ignored}
        for folder in folders
    )
    for folder, other in zip(folders[1:], others, strict=True):
        difference = describe_difference(first, other)
        if difference:
            raise FasaError(
                f"{folders[0]} and {folder} were not measured under the same conditions "
                f"({difference}); only rows of equal conditions can be compared"
            )


def describe_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The keys whose values differ, with both values; empty if none do."""
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return ", ".join(f"{key}: {one.get(key)!r:.60} and {other.get(key)!r:.60}" for key in keys)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FasaError(f"{path} is not a readable JSON file ({error})") from error
