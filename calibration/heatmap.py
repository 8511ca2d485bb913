"""Draw a calibration: the frequency chunks that each layer relies on."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.output_file import write_whole


def save_heatmap(dominant: DominantFCs, path: Path) -> None:
    """Draw the ranker's values, averaged over query heads, by layer and chunk, and save as PNG.

    Raises:
        FasaError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers, num_chunks = len(dominant.model.layers), dominant.model.rotation.num_chunks
    figure = Figure(figsize=(2 + num_chunks / 6, 2 + num_layers / 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(dominant.score.mean(dim=1).numpy(), aspect="auto", interpolation="nearest")
    axes.set_xlabel("frequency chunk (fast to slow)")
    axes.set_ylabel("layer that attends to all tokens")
    axes.set_title(f"{dominant.model.architecture}: {dominant.provenance['ranker']}")
    figure.colorbar(image, label="mean over query heads")
    png = BytesIO()
    # Without matplotlib's version, so that equal calibrations give equal pictures.
    figure.savefig(png, format="png", dpi=100, metadata={"Software": None})
    write_whole(path, png.getvalue())
