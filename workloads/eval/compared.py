"""Two results folders of one task, compared: ``fasa eval compare FOLDER FOLDER``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.bootstrap import mean_interval
from fasa_sglang.workloads.eval.results import (
    Row,
    read_conditions,
    read_rows,
    require_same_conditions,
)
from fasa_sglang.workloads.eval.summary import sorted_settings

# Conditions that a comparison may be about.
COMPARABLE = ("server", "request", "calibration")


def compare(one: Path, other: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Pair two folders sample by sample in every setting that both have.

    Returns:
        The conditions that differ, as pairs of values; and for every setting and metric the mean of
        ``other - one`` with its interval.

    Raises:
        FasaError: The folders differ in more than ``COMPARABLE``, or share no sample.
    """
    require_same_conditions([one, other], ignored=COMPARABLE)
    rows = [
        {(row.setting, row.sample): row for row in read_rows(folder)} for folder in (one, other)
    ]
    shared = sorted(rows[0].keys() & rows[1].keys())
    if not shared:
        raise FasaError(f"{one} and {other} have no sample and setting in common")
    entries = []
    for setting in sorted_settings(setting for setting, _ in shared):
        pairs = [(rows[0][key], rows[1][key]) for key in shared if key[0] == setting]
        entries += _paired_differences(setting, pairs)
    return _changes(read_conditions(one), read_conditions(other)), entries


def _paired_differences(setting: str, pairs: Sequence[tuple[Row, Row]]) -> list[dict[str, Any]]:
    entries = []
    # Not every sample has every metric.
    for metric in dict.fromkeys(metric for row, _ in pairs for metric in row.metrics):
        values = [
            (a.metrics[metric], b.metrics[metric])
            for a, b in pairs
            if metric in a.metrics and metric in b.metrics
        ]
        if not values:
            continue
        differences = [b - a for a, b in values]
        entries.append(
            {
                "setting": setting,
                "metric": metric,
                "samples": len(values),
                "one": float(np.mean([a for a, _ in values])),
                "other": float(np.mean([b for _, b in values])),
                "difference": float(np.mean(differences)),
                "interval": mean_interval(differences),
            }
        )
    return entries


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The comparable conditions that differ; ``server.combine`` is a key of a condition."""
    flat = [_flat(conditions) for conditions in (one, other)]
    keys = sorted({*flat[0], *flat[1]})
    pairs = {key: [values.get(key) for values in flat] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(conditions: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name in COMPARABLE:
        value = conditions.get(name)
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def comparison_table(one: Path, other: Path, entries: Sequence[Mapping[str, Any]]) -> Table:
    """The entries of ``compare`` as a table."""
    table = Table(title=f"{other} minus {one}")
    for heading in ("setting", "metric", "samples", "one", "other", "difference (95 %)"):
        table.add_column(heading, justify="right")
    for entry in entries:
        low, high = entry["interval"]
        table.add_row(
            entry["setting"],
            entry["metric"],
            str(entry["samples"]),
            f"{entry['one']:.4f}",
            f"{entry['other']:.4f}",
            f"{entry['difference']:+.4f} ({low:+.4f} to {high:+.4f})",
        )
    return table
