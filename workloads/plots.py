"""Figures of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_speedup(points: Sequence[tuple[str, int, float]], label: str, path: str) -> None:
    """Draw speed-up against context, one line per series.

    Args:
        points: (series, context in tokens, speed-up).
        label: Of the vertical axis.
        path: The PNG to write.
    """
    figure, axes = _canvas()
    for series in dict.fromkeys(name for name, _, _ in points):
        mine = sorted((context, speedup) for name, context, speedup in points if name == series)
        axes.plot(*zip(*mine, strict=True), "o-", label=series)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(label)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def plot_budgets(entries: Sequence[Mapping[str, Any]], metric: str, path: str) -> None:
    """Draw a metric against the budget, one line per selector, dense across.

    Args:
        entries: Of ``results.summarise``.
        metric: Which one; its interval is drawn too.
        path: The PNG to write.
    """
    figure, axes = _canvas()
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for entry in entries:
        if metric not in entry:
            continue
        selector, _, budget = entry["setting"].partition("-")
        if not budget:
            if metric != "kl":  # dense has none
                axes.axhline(entry[metric], color="grey", linewidth=0.8, label=selector)
            continue
        low, high = entry[f"{metric}_interval"]
        value = entry[metric]
        lines.setdefault(selector, []).append((int(budget), value, value - low, high - value))
    for selector, points in lines.items():
        at, values, below, above = zip(*sorted(points), strict=True)
        errors = np.maximum(np.array([below, above]), 0)
        axes.errorbar(at, values, yerr=errors, fmt="o-", capsize=3, label=selector)
    axes.set_xscale("log", base=2)
    budgets = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set_xlabel("budget, tokens")
    if metric == "kl":
        axes.set_yscale("log")
    axes.set_ylabel(metric)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def plot_depths(
    cells: Mapping[tuple[float, int], float], label: str, title: str, path: str
) -> None:
    """Draw a heat map of needle depth against prompt length.

    Args:
        cells: Mean of the metric by (depth from 0 to 1, length in tokens).
        label: Of the colours.
        title: Of the figure.
        path: The PNG to write.
    """
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for (depth, length), value in cells.items():
        grid[depths.index(depth), lengths.index(length)] = value
    figure, axes = _canvas()
    image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("depth")
    axes.set_title(title)
    figure.colorbar(image, label=label)
    figure.savefig(path, format="png", dpi=120)


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
