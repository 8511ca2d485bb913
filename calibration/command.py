"""``fasa calibrate``: arguments in, file, picture and table out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fasa_sglang.calibration import corpus
from fasa_sglang.calibration.calibrate import CalibrationSettings, calibrate, load_model
from fasa_sglang.calibration.heatmap import save_heatmap
from fasa_sglang.calibration.rankers import RANKERS
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError

# Characters of a dataset to read per token wanted; more than any tokenizer needs.
CHARS_PER_TOKEN = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; defaults live in ``CalibrationSettings``."""
    defaults = CalibrationSettings()
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on")
    source.add_argument("--dataset", metavar="NAME[:CONFIG]", help="Hugging Face dataset")
    parser.add_argument("--out", metavar="FILE", help="default: <model>.fasa.safetensors")
    parser.add_argument("--num-fcs", type=int, metavar="N", help="default: half of the chunks")
    parser.add_argument("--ranker", choices=RANKERS, default=defaults.ranker)
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="length of the text")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="K, in tokens")
    parser.add_argument("--num-queries", type=int, default=defaults.num_queries)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--rope-layout", choices=("neox", "interleaved"), help="of unknown model types"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the provenance as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: The model, the text or a setting cannot be used.
    """
    settings = CalibrationSettings(
        ranker=args.ranker,
        num_fcs=args.num_fcs,
        tokens=args.tokens,
        top_k=args.top_k,
        num_queries=args.num_queries,
        seed=args.seed,
    )
    out = Path(args.out or f"{Path(args.model).name}.fasa.safetensors")
    if not out.parent.is_dir():
        raise CalibrationError(
            f"cannot write {out}: there is no folder {out.parent}; make it first"
        )
    if args.text:
        text = corpus.text_file(args.text)
    elif args.dataset:
        text = corpus.dataset_text(args.dataset, CHARS_PER_TOKEN * settings.tokens)
    else:
        text = corpus.default_text()
    model, tokenizer = load_model(args.model, args.device)
    with progress_bar() as progress:
        dominant = calibrate(
            model,
            tokenizer,
            text,
            corpus.held_out_text(),
            settings,
            interleaved=args.rope_layout and args.rope_layout == "interleaved",
            progress=progress,
        )
    dominant.save(out)
    picture = out.with_suffix(".png")
    save_heatmap(dominant, picture)
    if args.json:
        report = {"file": str(out), "picture": str(picture), **dominant.provenance}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    console = Console()
    console.print(quality_table(dominant))
    console.print(f"wrote {out} and {picture}", soft_wrap=True)


def progress_bar() -> Progress:
    """The progress display of a calibration, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def quality_table(dominant: DominantFCs) -> Table:
    """The held-out figures of a calibration, one row per number of chunks."""
    made = dominant.provenance
    held_out = made["held_out"]
    table = Table(
        title=f"{dominant.model.architecture}, ranked by {made['ranker']} on {made['text']}, "
        f"judged on {held_out['text']}, K = {made['top_k']}"
    )
    for heading in ("chunks", "agreement with true top-K", "softmax mass", "mass of true top-K"):
        table.add_column(heading, justify="right")
    for row in zip(
        held_out["num_fcs"],
        held_out["agreement"],
        held_out["mass"],
        held_out["oracle_mass"],
        strict=True,
    ):
        chunks, *figures = row
        chosen = " *" if chunks == dominant.num_fcs else ""
        total = dominant.model.rope.num_chunks
        table.add_row(f"{chunks} of {total}{chosen}", *(f"{figure:.3f}" for figure in figures))
    return table
