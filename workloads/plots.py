"""Figures of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_speedup(points: Sequence[tuple[str, int, float]], label: str, path: str) -> None:
    """Draw speed-up against context, one line per series.

    Args:
        points: (series, context in tokens, speed-up).
        label: Of the vertical axis.
        path: The PNG to write.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for series in dict.fromkeys(name for name, _, _ in points):
        mine = sorted((context, speedup) for name, context, speedup in points if name == series)
        axes.plot(*zip(*mine, strict=True), "o-", label=series)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(label)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
