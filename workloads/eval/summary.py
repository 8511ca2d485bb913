"""What the rows of an evaluation add up to, setting by setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from fasa_sglang.workloads.eval.bootstrap import mean_interval
from fasa_sglang.workloads.eval.results import Row
from fasa_sglang.workloads.eval.settings import DENSE, Setting


def sorted_settings(names: Iterable[str]) -> list[str]:
    """Setting names without duplicates: dense, then by selector, with rising budgets."""
    return sorted(set(names), key=lambda name: Setting.from_name(name).order)


def summarise(rows: Sequence[Row], metrics: Iterable[str]) -> list[dict[str, Any]]:
    """One entry per setting, dense first.

    Differences are paired: each sample is compared with dense decoding of the same sample, over the
    samples that both settings have.

    Returns:
        Entries with ``setting``, ``samples``, ``kv_read_ratio``, ``tokens_per_s`` and, for every
        metric that the setting has, its mean, ``<metric>_interval``, ``<metric>_difference`` from
        dense and ``<metric>_difference_interval``.
    """
    dense = {row.sample: row for row in rows if row.setting == DENSE}
    entries = []
    for setting in sorted_settings(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        ratios = [row.kv_read_ratio for row in own if row.kv_read_ratio is not None]
        entry: dict[str, Any] = {
            "setting": setting,
            "samples": len(own),
            "kv_read_ratio": float(np.mean(ratios)) if ratios else None,
            "tokens_per_s": _tokens_per_s(own),
        }
        for metric in metrics:
            measured = [row for row in own if metric in row.metrics]
            if not measured:
                continue
            values = [row.metrics[metric] for row in measured]
            entry[metric] = float(np.mean(values))
            entry[f"{metric}_interval"] = mean_interval(values)
            differences = [
                row.metrics[metric] - dense[row.sample].metrics[metric]
                for row in measured
                if row.sample in dense and metric in dense[row.sample].metrics
            ]
            if differences and setting != DENSE:
                entry[f"{metric}_difference"] = float(np.mean(differences))
                entry[f"{metric}_difference_interval"] = mean_interval(differences)
        entries.append(entry)
    return entries


def summary_table(
    title: str, entries: Sequence[Mapping[str, Any]], metrics: Iterable[str]
) -> Table:
    """The entries of ``summarise`` as a table."""
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
            difference = entry.get(f"{metric}_difference")
            low, high = entry.get(f"{metric}_difference_interval", (0, 0))
            cells.append(
                "" if difference is None else f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"
            )
        table.add_row(*cells)
    return table


def _tokens_per_s(rows: Sequence[Row]) -> float | None:
    """Tokens per second and request; None if the requests were not timed."""
    seconds = sum(row.seconds for row in rows)
    return sum(row.completion_tokens for row in rows) / seconds if seconds else None
