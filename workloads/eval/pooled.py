"""Results of several tasks as one: ``fasa eval pool FOLDER...``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import bootstrap

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.results import (
    CONFIDENCE,
    RESAMPLES,
    Row,
    read_conditions,
    read_rows,
    require_equal,
    setting_order,
    summarise,
)
from fasa_sglang.workloads.eval.settings import DENSE

# What may differ between the tasks of a pool.
OF_THE_TASK = ("task", "haystack")


@dataclass
class Pool:
    """Tasks that were run alike.

    Args:
        metric: Of all of them.
        tasks: Mean of every setting, task by task.
        left_out: Tasks that say nothing about selection, and why.
        entries: As ``results.summarise`` makes them, of all samples together, and of each the
            share of dense that is kept, ``kept`` and ``kept_interval``.
    """

    metric: str
    tasks: dict[str, dict[str, float]]
    left_out: dict[str, str]
    entries: list[dict[str, Any]]


def pool(folders: Sequence[Path], min_dense: float) -> Pool:
    """Put the samples of several tasks together, in the settings that all of them have.

    Tasks that were decoded densely only are left out.

    Args:
        folders: Results of one task each.
        min_dense: Tasks of which the dense model gets less are left out, too: nothing can be lost
            there.

    Raises:
        FasaError: They were not made alike, have no metric or setting in common, or no task is
            left.
    """
    conditions = [read_conditions(folder) for folder in folders]
    alike = [{k: v for k, v in held.items() if k not in OF_THE_TASK} for held in conditions]
    for folder, held in zip(folders[1:], alike[1:], strict=True):
        require_equal(folders[0], folder, alike[0], held)
    rows = {held["task"]: read_rows(f) for f, held in zip(folders, conditions, strict=True)}
    if len(rows) < len(folders):
        raise FasaError("two of the folders hold the same task; pool takes each once")
    metrics = [set().union(*(row.metrics for row in of_task)) for of_task in rows.values()]
    shared = sorted(set.intersection(*metrics))
    if not shared:
        raise FasaError(f"{', '.join(rows)} have no metric in common")
    metric = shared[0]
    means = {task: _means(of_task, metric) for task, of_task in rows.items()}
    reasons = {task: _why_not(of_task, min_dense) for task, of_task in means.items()}
    left_out = {task: reason for task, reason in reasons.items() if reason}
    tasks = {task: of_task for task, of_task in means.items() if task not in left_out}
    if not tasks:
        what = "; ".join(f"{task}: {reason}" for task, reason in left_out.items())
        raise FasaError(f"no task is left to pool ({what})")
    settings = set.intersection(*(set(of_task) for of_task in tasks.values()))
    together = [
        replace(row, sample=f"{task}/{row.sample}")
        for task in tasks
        for row in rows[task]
        if row.setting in settings
    ]
    entries = summarise(together, [metric])
    densely = {row.sample: row.metrics[metric] for row in together if row.setting == DENSE}
    for entry in entries:
        mine = [row for row in together if row.setting == entry["setting"]]
        entry |= _kept(mine, densely, metric)
    return Pool(metric, tasks, left_out, entries)


def _why_not(means: Mapping[str, float], min_dense: float) -> str | None:
    """Why a task is left out; None if it is not."""
    if means.get(DENSE, 0.0) < min_dense:
        return f"dense gets {means.get(DENSE, 0.0):.3f}"
    return None if means.keys() - {DENSE} else "decoded densely only"


def _means(rows: Sequence[Row], metric: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if metric in row.metrics:
            found.setdefault(row.setting, []).append(row.metrics[metric])
    return {setting: float(np.mean(values)) for setting, values in found.items()}


def _kept(rows: Sequence[Row], densely: Mapping[str, float], metric: str) -> dict[str, Any]:
    """Sum over dense's sum, over the samples that both have; its interval by paired bootstrap."""
    pairs = [(r.metrics[metric], densely[r.sample]) for r in rows if r.sample in densely]
    if not pairs or not any(dense for _, dense in pairs):
        return {}
    mine, dense = np.array(pairs).T
    if (mine == dense).all():
        return {"kept": 1.0, "kept_interval": (1.0, 1.0)}

    def share(mine: Any, dense: Any, axis: int = -1) -> Any:
        return mine.sum(axis=axis) / dense.sum(axis=axis)

    found = bootstrap(
        (mine, dense),
        share,
        paired=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return {
        "kept": float(share(mine, dense)),
        "kept_interval": (float(found.low), float(found.high)),
    }


def pool_tables(pooled: Pool) -> list[Table]:
    """All samples together, and the tasks one by one."""
    whole = Table(title=f"{pooled.metric} over {len(pooled.tasks)} tasks")
    for heading in ("setting", "samples", "KV read", pooled.metric, "of dense (95 %)"):
        whole.add_column(heading, justify="right")
    for entry in pooled.entries:
        ratio = entry["kv_read_ratio"]
        low, high = entry.get("kept_interval", (0, 0))
        whole.add_row(
            entry["setting"],
            str(entry["samples"]),
            "" if ratio is None else f"{ratio:.3f}",
            f"{entry[pooled.metric]:.4f}",
            f"{entry['kept']:.1%} ({low:.1%} to {high:.1%})" if "kept" in entry else "",
        )
    single = Table(title=f"{pooled.metric}, task by task")
    for heading in ("setting", *pooled.tasks):
        single.add_column(heading, justify="right")
    settings = {setting for of_task in pooled.tasks.values() for setting in of_task}
    for setting in sorted(settings, key=setting_order):
        cells = [of_task.get(setting) for of_task in pooled.tasks.values()]
        single.add_row(setting, *("" if cell is None else f"{cell:.3f}" for cell in cells))
    return [whole, single]
