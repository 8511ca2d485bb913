"""Print, draw and write the results of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.compared import compare, comparison_table
from fasa_sglang.workloads.eval.pooled import pool, pool_tables
from fasa_sglang.workloads.eval.results import SUMMARY, Results
from fasa_sglang.workloads.eval.settings import DENSE
from fasa_sglang.workloads.eval.summary import summarise, summary_table
from fasa_sglang.workloads.eval.task import Task
from fasa_sglang.workloads.plots import plot_budgets, plot_depths, plot_distances


def report_task(task: Task, results: Results, console: Console) -> None:
    """Print and draw the rows of one task, and write their summary."""
    entries = summarise(results.rows, [*task.metrics, *task.distances])
    console.print(summary_table(f"{task.name}: {results.folder}", entries, task.metrics))
    summary = {"conditions": results.conditions, "settings": entries}
    (results.folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    model = str(results.conditions["model"]).split()[0]
    for metric, label in task.metrics.items():
        if any(metric in entry for entry in entries if entry["setting"] != DENSE):
            plot_budgets(
                entries,
                metric,
                title=f"{task.name}, {model}",
                label=label,
                path=str(results.folder / f"{metric}.png"),
            )
    if any(metric in entry for entry in entries for metric in task.distances):
        plot_distances(
            entries,
            task.distances,
            title=f"{task.name}, {model}",
            path=str(results.folder / "distances.png"),
        )
    if all("depth" in row.info for row in results.rows):
        for entry in entries:
            _draw_depths(task, results, entry["setting"])


def _draw_depths(task: Task, results: Results, setting: str) -> None:
    metric, label = next(iter(task.metrics.items()))
    cells: dict[tuple[float, int], list[float]] = {}
    for row in results.rows:
        if row.setting == setting:
            cell = (row.info["depth"], row.info["length"])
            cells.setdefault(cell, []).append(row.metrics[metric])
    plot_depths(
        {cell: sum(values) / len(values) for cell, values in cells.items()},
        title=f"{task.name}, {setting}",
        label=label,
        path=str(results.folder / f"depths-{setting}.png"),
    )


def report_pool(folders: Sequence[str], out: Path, min_dense: float, console: Console) -> None:
    """Pool results folders, print and draw them, and write their summary.

    Raises:
        FasaError: There are fewer than two folders, or they cannot be pooled.
    """
    if len(folders) < 2:
        raise FasaError(f"pool takes two or more results folders, got {len(folders)}")
    pooled = pool([Path(folder) for folder in folders], min_dense)
    for table in pool_tables(pooled):
        console.print(table)
    for task, reason in pooled.left_out.items():
        console.print(f"{task} is left out: {reason}")
    out.mkdir(parents=True, exist_ok=True)
    plot_budgets(
        pooled.entries,
        pooled.metric,
        title=f"{len(pooled.tasks)} tasks pooled",
        label=f"mean {pooled.metric}",
        path=str(out / f"{pooled.metric}.png"),
    )
    summary = {"pooled": folders, "left_out": pooled.left_out, "settings": pooled.entries}
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def report_comparison(folders: Sequence[str], console: Console) -> None:
    """Compare two results folders and print the differences.

    Raises:
        FasaError: There are not two folders, or they cannot be compared.
    """
    if len(folders) != 2:
        raise FasaError(f"compare takes two results folders, got {len(folders)}")
    one, other = (Path(folder) for folder in folders)
    changes, entries = compare(one, other)
    console.print(comparison_table(one, other, entries))
    for key, (before, after) in changes.items():
        console.print(f"{key}: {before} and {after}")
