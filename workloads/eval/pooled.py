"""Results of several tasks as one: ``fasa eval pool FOLDER...``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.bootstrap import ratio_interval
from fasa_sglang.workloads.eval.results import (
    Row,
    read_conditions,
    read_rows,
    require_same_conditions,
)
from fasa_sglang.workloads.eval.settings import DENSE
from fasa_sglang.workloads.eval.summary import sorted_settings, summarise

# Conditions that may differ between the tasks of a pool.
TASK_CONDITIONS = ("task", "haystack")


@dataclass
class Pool:
    """Tasks that were measured under the same conditions.

    Args:
        metric: The metric that all tasks have.
        tasks: Mean of the metric by task and setting.
        left_out: Why a task was left out, by task.
        entries: Entries of ``summarise`` over the samples of all tasks, each with the share of
            dense decoding's score, ``share_of_dense``, and ``share_of_dense_interval``.
    """

    metric: str
    tasks: dict[str, dict[str, float]]
    left_out: dict[str, str]
    entries: list[dict[str, Any]]


def pool(folders: Sequence[Path], min_dense: float) -> Pool:
    """Pool the samples of several tasks, in the settings that all of them have.

    Tasks that were decoded only densely are left out.

    Args:
        folders: Results of one task each.
        min_dense: Leave out tasks where dense decoding scores below this: they have nothing to
            lose.

    Raises:
        FasaError: The conditions of the tasks differ, they have no metric or setting in common, or
            all of them are left out.
    """
    require_same_conditions(folders, ignored=TASK_CONDITIONS)
    rows = {read_conditions(folder)["task"]: read_rows(folder) for folder in folders}
    if len(rows) < len(folders):
        raise FasaError("two of the folders have the same task; pool takes each task once")
    metrics = [set().union(*(row.metrics for row in task_rows)) for task_rows in rows.values()]
    shared = sorted(set.intersection(*metrics))
    if not shared:
        raise FasaError(f"{', '.join(rows)} have no metric in common")
    metric = shared[0]
    means = {task: _means(task_rows, metric) for task, task_rows in rows.items()}
    reasons = {task: _reason_to_leave_out(by_name, min_dense) for task, by_name in means.items()}
    left_out = {task: reason for task, reason in reasons.items() if reason}
    tasks = {task: by_name for task, by_name in means.items() if task not in left_out}
    if not tasks:
        details = "; ".join(f"{task}: {reason}" for task, reason in left_out.items())
        raise FasaError(f"all tasks are left out of the pool ({details})")
    settings = set.intersection(*(set(by_name) for by_name in tasks.values()))
    samples = [
        replace(row, sample=f"{task}/{row.sample}")
        for task in tasks
        for row in rows[task]
        if row.setting in settings
    ]
    entries = summarise(samples, [metric])
    dense = {row.sample: row.metrics[metric] for row in samples if row.setting == DENSE}
    for entry in entries:
        own = [row for row in samples if row.setting == entry["setting"]]
        entry |= _share_of_dense(own, dense, metric)
    return Pool(metric, tasks, left_out, entries)


def _reason_to_leave_out(means: Mapping[str, float], min_dense: float) -> str | None:
    if means.get(DENSE, 0.0) < min_dense:
        return f"dense decoding scores {means.get(DENSE, 0.0):.3f}"
    return None if means.keys() - {DENSE} else "it was decoded only densely"


def _means(rows: Sequence[Row], metric: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if metric in row.metrics:
            values.setdefault(row.setting, []).append(row.metrics[metric])
    return {setting: float(np.mean(column)) for setting, column in values.items()}


def _share_of_dense(rows: Sequence[Row], dense: Mapping[str, float], metric: str) -> dict[str, Any]:
    """The setting's sum over dense decoding's sum, over the samples that both have."""
    pairs = [(row.metrics[metric], dense[row.sample]) for row in rows if row.sample in dense]
    if not pairs or not any(reference for _, reference in pairs):
        return {}
    own, reference = (list(column) for column in zip(*pairs, strict=True))
    return {
        "share_of_dense": sum(own) / sum(reference),
        "share_of_dense_interval": ratio_interval(own, reference),
    }


def pool_tables(pooled: Pool) -> list[Table]:
    """All samples together, and the tasks one by one."""
    whole = Table(title=f"{pooled.metric} over {len(pooled.tasks)} tasks")
    for heading in ("setting", "samples", "KV read", pooled.metric, "share of dense (95 %)"):
        whole.add_column(heading, justify="right")
    for entry in pooled.entries:
        ratio, share = entry["kv_read_ratio"], entry.get("share_of_dense")
        low, high = entry.get("share_of_dense_interval", (0, 0))
        whole.add_row(
            entry["setting"],
            str(entry["samples"]),
            "" if ratio is None else f"{ratio:.3f}",
            f"{entry[pooled.metric]:.4f}",
            "" if share is None else f"{share:.1%} ({low:.1%} to {high:.1%})",
        )
    single = Table(title=f"{pooled.metric}, task by task")
    for heading in ("setting", *pooled.tasks):
        single.add_column(heading, justify="right")
    for setting in sorted_settings(name for means in pooled.tasks.values() for name in means):
        cells = [means.get(setting) for means in pooled.tasks.values()]
        single.add_row(setting, *("" if cell is None else f"{cell:.3f}" for cell in cells))
    return [whole, single]
