"""A picture of a calibration: which frequency chunks each layer relies on."""

from __future__ import annotations

from pathlib import Path

from fasa_sglang.dominant_fcs import DominantFCs


def save_heatmap(dominant: DominantFCs, path: str | Path) -> None:
    """Draw layers by frequency chunks, the ranker's value averaged over the query heads, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers, num_chunks = dominant.model.num_layers, dominant.model.rope.num_chunks
    figure = Figure(figsize=(2 + num_chunks / 6, 2 + num_layers / 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(dominant.score.mean(dim=1).numpy(), aspect="auto", interpolation="nearest")
    axes.set_xlabel("frequency chunk (fast to slow)")
    axes.set_ylabel("layer")
    axes.set_title(f"{dominant.model.architecture}: {dominant.provenance['ranker']}")
    figure.colorbar(image, label="mean over query heads")
    # Without the software's version, so that equal calibrations give equal pictures.
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})
