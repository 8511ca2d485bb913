"""Figures of benchmarks and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fasa_sglang.workloads.eval.settings import DENSE, Setting

# The divergence of dense decoding from itself is 0, which a logarithmic axis cannot show.
LOGARITHMIC = ("kl",)


def plot_speedup(
    points: Sequence[tuple[str, int, float]], *, title: str, label: str, path: str
) -> None:
    """Draw speed-up against context length, one line per series.

    Args:
        points: (series, context in tokens, speed-up).
        title: Title of the figure.
        label: Label of the vertical axis; names the baseline.
        path: The PNG file to write.
    """
    figure, axes = _canvas(title)
    for series in dict.fromkeys(name for name, _, _ in points):
        line = sorted((context, speedup) for name, context, speedup in points if name == series)
        axes.plot(*zip(*line, strict=True), "o-", label=series)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(label)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def plot_budgets(
    entries: Sequence[Mapping[str, Any]], metric: str, *, title: str, label: str, path: str
) -> None:
    """Draw a metric against the budget, one line per selector, with dense decoding as a level.

    Args:
        entries: Entries of ``eval.summary.summarise``.
        metric: The metric to draw, with its 95 % intervals.
        title: Title of the figure.
        label: Readable name of the metric.
        path: The PNG file to write.
    """
    figure, axes = _canvas(title)
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for entry in entries:
        if metric not in entry:
            continue
        setting = Setting.from_name(entry["setting"])
        value = entry[metric]
        if setting.budget is None:
            if metric not in LOGARITHMIC:
                axes.axhline(value, color="grey", linewidth=0.8, label=DENSE)
            continue
        low, high = entry[f"{metric}_interval"]
        point = (setting.budget, value, value - low, high - value)
        lines.setdefault(setting.selector, []).append(point)
    for selector, points in lines.items():
        budgets, values, below, above = zip(*sorted(points), strict=True)
        errors = np.maximum(np.array([below, above]), 0)
        axes.errorbar(budgets, values, yerr=errors, fmt="o-", capsize=3, label=selector)
    axes.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xticks(ticks, [str(budget) for budget in ticks])
    axes.set_xlabel("budget, tokens per (request, KV head)")
    if metric in LOGARITHMIC:
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.legend(title="bars: 95 % intervals")
    figure.savefig(path, format="png", dpi=120)


def plot_depths(
    cells: Mapping[tuple[float, int], float], *, title: str, label: str, path: str
) -> None:
    """Draw a heat map of needle depth against prompt length.

    Args:
        cells: Mean of the metric by (depth from 0 to 1, length in tokens).
        title: Title of the figure.
        label: Readable name of the metric.
        path: The PNG file to write.
    """
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for (depth, length), value in cells.items():
        grid[depths.index(depth), lengths.index(length)] = value
    figure, axes = _canvas(title)
    image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(image, label=label)
    figure.savefig(path, format="png", dpi=120)


def plot_distances(
    entries: Sequence[Mapping[str, Any]],
    distances: Mapping[str, int],
    *,
    title: str,
    path: str,
) -> None:
    """Draw the share of values found again against look-back distance, one line per setting.

    Args:
        entries: Entries of ``eval.summary.summarise``.
        distances: Metrics to draw and the least distance in tokens that each counts.
        title: Title of the figure.
        path: The PNG file to write.
    """
    figure, axes = _canvas(title)
    keys = sorted(distances, key=lambda key: distances[key])
    for entry in entries:
        points = [(i, entry[key]) for i, key in enumerate(keys) if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=entry["setting"])
    axes.set_xticks(range(len(keys)), [f"{distances[key]}+" for key in keys])
    axes.set_xlabel("look-back, tokens")
    axes.set_ylabel("share of values found again")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def _canvas(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes
