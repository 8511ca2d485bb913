"""Rows of an evaluation on disk, and what they add up to.

A folder belongs to one task under one set of conditions. Rows are appended as samples come back, so
that nothing is lost when a run ends early, and a rerun leaves out what is there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import bootstrap

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.settings import DENSE

CONDITIONS, ROWS, SUMMARY = "conditions.json", "rows.jsonl", "summary.json"
CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One sample decoded in one setting.

    Args:
        sample: Which sample; equal names are the same prompt.
        setting: ``Setting.name``.
        metrics: What the task measures.
        info: What the sample is: its length, where the needle lies.
        prompt_tokens: Of the request.
        completion_tokens: Of the reply.
        kv_read_ratio: Share of the KV rows that were read; None where the server did not say.
        seconds: From request to reply, beside others of the same setting; 0 where settings shared
            batches.
        text: The reply, cut.
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
        folder: Made if it is not there.
        conditions: Everything that the rows depend on, JSON values only.

    Raises:
        FasaError: The folder holds rows of other conditions, or is not readable.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any]) -> None:
        self.folder, self.conditions = folder, dict(conditions)
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONDITIONS
        if path.exists():
            there = _read_json(path)
            differing = sorted(
                key
                for key in {*there, *self.conditions}
                if there.get(key) != self.conditions.get(key)
            )
            if differing:
                what = _differences(differing, there, self.conditions)
                raise FasaError(
                    f"{folder} holds results of other settings ({what}); give another --out"
                )
        else:
            path.write_text(json.dumps(self.conditions, indent=2) + "\n")
        self.rows = read_rows(folder)
        self._file = (folder / ROWS).open("a")

    def add(self, row: Row) -> None:
        """Keep a row, on disk before this returns."""
        with self._lock:
            self.rows.append(row)
            self._file.write(json.dumps(asdict(row)) + "\n")
            self._file.flush()

    def find(self, sample: str, setting: str) -> Row | None:
        """The row of a sample in a setting, if it is there."""
        return next(
            (row for row in self.rows if (row.sample, row.setting) == (sample, setting)), None
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def folder_name(task: str, model: str, conditions: Mapping[str, Any]) -> str:
    """A name that tells conditions apart: task, model and a hash."""
    text = json.dumps(conditions, sort_keys=True)
    return f"{task}-{Path(model).name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder; a last line that was cut off while it was written is dropped.

    Raises:
        FasaError: A line cannot be read.
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
            raise FasaError(f"line {number} of {path} is no row of results ({error})") from error
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean, by percentiles, the same for equal values."""
    if len(values) < 2 or max(values) == min(values):
        return (float(np.mean(values)),) * 2
    found = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def summarise(rows: Sequence[Row], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per setting, dense first.

    Differences are paired: taken sample by sample against dense, over the samples that both have.
    """
    settings = sorted({row.setting for row in rows}, key=setting_order)
    dense = {row.sample: row for row in rows if row.setting == DENSE}
    entries = []
    for setting in settings:
        mine = [row for row in rows if row.setting == setting]
        ratios = [row.kv_read_ratio for row in mine if row.kv_read_ratio is not None]
        entry: dict[str, Any] = {
            "setting": setting,
            "samples": len(mine),
            "kv_read_ratio": float(np.mean(ratios)) if ratios else None,
            "tokens_per_s": _speed(mine),
        }
        for metric in metrics:
            held = [row for row in mine if metric in row.metrics]
            if not held:
                continue
            entry[metric] = float(np.mean([row.metrics[metric] for row in held]))
            entry[f"{metric}_interval"] = interval([row.metrics[metric] for row in held])
            paired = [
                row.metrics[metric] - dense[row.sample].metrics[metric]
                for row in held
                if row.sample in dense and metric in dense[row.sample].metrics
            ]
            if paired and setting != DENSE:
                entry[f"{metric}_difference"] = float(np.mean(paired))
                entry[f"{metric}_difference_interval"] = interval(paired)
        entries.append(entry)
    return entries


def _speed(rows: Sequence[Row]) -> float | None:
    """Tokens per second and request; None where nobody timed them."""
    seconds = sum(row.seconds for row in rows)
    return sum(row.completion_tokens for row in rows) / seconds if seconds else None


def setting_order(name: str) -> tuple[bool, str, int]:
    """Dense, then selector by selector, budgets rising."""
    selector, _, budget = name.partition("-")
    return name != DENSE, selector, int(budget or 0)


def summary_table(
    title: str, entries: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> Table:
    """The entries of ``summarise``."""
    table = Table(title=title)
    table.add_column("setting")
    for heading in ("samples", "KV read", "tokens/s"):
        table.add_column(heading, justify="right")
    for metric in metrics:
        table.add_column(metric, justify="right")
        table.add_column(f"{metric} - dense (95 %)", justify="right")
    for entry in entries:
        cells = [entry["setting"], str(entry["samples"])]
        cells.append("" if entry["kv_read_ratio"] is None else f"{entry['kv_read_ratio']:.3f}")
        speed = entry["tokens_per_s"]
        cells.append("" if speed is None else f"{speed:.1f}")
        for metric in metrics:
            cells.append(f"{entry[metric]:.4f}" if metric in entry else "")
            low, high = entry.get(f"{metric}_difference_interval", (0, 0))
            difference = entry.get(f"{metric}_difference")
            shown = "" if difference is None else f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"
            cells.append(shown)
        table.add_row(*cells)
    return table


def compare(one: Path, other: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Pair two folders sample by sample, setting by setting.

    Returns:
        What differs between their server's settings; and per setting and metric the mean of
        ``other - one`` with its interval.

    Raises:
        FasaError: They are of different tasks, models or samples.
    """
    conditions = [read_conditions(folder) for folder in (one, other)]
    free = ("server", "request", "calibration", "settings")
    fixed = [{k: v for k, v in held.items() if k not in free} for held in conditions]
    require_equal(one, other, *fixed)
    rows = [
        {(row.setting, row.sample): row for row in read_rows(folder)} for folder in (one, other)
    ]
    shared = sorted(rows[0].keys() & rows[1].keys())
    if not shared:
        raise FasaError(f"{one} and {other} have no sample and setting in common")
    entries = []
    for setting in sorted({setting for setting, _ in shared}, key=setting_order):
        pairs = [(rows[0][key], rows[1][key]) for key in shared if key[0] == setting]
        # A sample may have nothing that a metric counts.
        for metric in dict.fromkeys(metric for a, _ in pairs for metric in a.metrics):
            both = [
                (a.metrics[metric], b.metrics[metric])
                for a, b in pairs
                if metric in a.metrics and metric in b.metrics
            ]
            if not both:
                continue
            differences = [b - a for a, b in both]
            entries.append(
                {
                    "setting": setting,
                    "metric": metric,
                    "samples": len(both),
                    "one": float(np.mean([a for a, _ in both])),
                    "other": float(np.mean([b for _, b in both])),
                    "difference": float(np.mean(differences)),
                    "interval": interval(differences),
                }
            )
    changed = {
        key: [held.get(key) for held in conditions]
        for key in free
        if conditions[0].get(key) != conditions[1].get(key)
    }
    return changed, entries


def read_conditions(folder: Path) -> dict[str, Any]:
    """The conditions of a results folder.

    Raises:
        FasaError: It holds none.
    """
    return _read_json(folder / CONDITIONS)


def require_equal(
    one: Path, other: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    """Refuse to relate rows that were made under other conditions.

    Raises:
        FasaError: ``mine``, of the folder ``one``, differs from ``theirs``, of ``other``.
    """
    differing = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
    if differing:
        raise FasaError(
            f"{one} and {other} were not made under the same conditions "
            f"({_differences(differing, mine, theirs)}); only rows of equal ones can be compared"
        )


def _differences(keys: Sequence[str], one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {one.get(key)!r:.60} and {other.get(key)!r:.60}" for key in keys)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FasaError(f"{path} is no readable JSON file ({error})") from error
