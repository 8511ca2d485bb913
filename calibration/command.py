"""``fasa calibrate``: write a model's calibration, a picture of it, and a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fasa_sglang.calibration import corpus
from fasa_sglang.calibration.calibrate import calibrate
from fasa_sglang.calibration.heatmap import save_heatmap
from fasa_sglang.calibration.model import DTYPES, load_model, memory_errors_explained
from fasa_sglang.calibration.progress import progress_bar
from fasa_sglang.calibration.rankers import RANKERS
from fasa_sglang.calibration.settings import DEFAULT_TOKENS, DEFAULT_TOP_K, CalibrationSettings
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError
from fasa_sglang.output_file import require_writable, write_whole
from fasa_sglang.own_command import sigterm_exits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    defaults = CalibrationSettings()
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype to run the model in; auto is bfloat16 on a GPU and float32 on a CPU",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on")
    source.add_argument(
        "--dataset", metavar="NAME[:CONFIG]", help="Hugging Face dataset to calibrate on"
    )
    parser.add_argument("--out", metavar="FILE", help="file to write; default: <model>.fasa")
    parser.add_argument("--no-picture", action="store_true", help="do not draw <out>.png")
    parser.add_argument(
        "--num-fcs",
        type=int,
        metavar="N",
        help="default number of chunks that a server reads per KV head; without this flag, half of "
        "the chunks but at least 24, or all if there are fewer",
    )
    parser.add_argument(
        "--ranker", choices=RANKERS, default=defaults.ranker, help="measure that orders the chunks"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help=f"length of the text; default: {DEFAULT_TOKENS}, or the model's context if shorter",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        help=f"K of the rankers, in tokens; default: {DEFAULT_TOP_K}, or a quarter of the text",
    )
    parser.add_argument(
        "--num-queries", type=int, default=defaults.num_queries, help="number of sampled queries"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of that sample")
    parser.add_argument(
        "--rope-layout",
        choices=("neox", "interleaved"),
        help="rotary layout, for a model type that FASA does not know",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to run the model on; cuda uses all GPUs if accelerate is installed",
    )
    parser.add_argument("--json", metavar="FILE", help="write the provenance as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: The model, the text or a setting is invalid, or a file cannot be written.
    """
    settings = CalibrationSettings(
        ranker=args.ranker,
        num_fcs=args.num_fcs,
        tokens=args.tokens,
        top_k=args.top_k,
        num_queries=args.num_queries,
        seed=args.seed,
    )
    out = Path(args.out or f"{Path(args.model).resolve().name}.fasa")
    _require_outside_models(out)
    for path in (out, args.json):
        if path is not None:
            require_writable(Path(path))
    text = _text(args, settings)
    with sigterm_exits(), memory_errors_explained(args.model):
        model, tokenizer = load_model(
            args.model, args.device, args.revision, args.trust_remote_code, args.dtype
        )
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
    written = [str(out)]
    if not args.no_picture:
        picture = out.with_name(f"{out.name}.png")
        save_heatmap(dominant, picture)
        written.append(str(picture))
    if args.json:
        report = {"files": written, **dominant.provenance}
        write_whole(Path(args.json), (json.dumps(report, indent=2) + "\n").encode())
    console = Console()
    console.print(quality_table(dominant))
    console.print(f"wrote {' and '.join(written)}", soft_wrap=True)


def _require_outside_models(out: Path) -> None:
    """Refuse a model's folder: SGLang reads every .safetensors file there as weights."""
    folder = out.resolve().parent
    if (folder / "config.json").exists():
        raise CalibrationError(
            f"cannot write {out}: {folder} is a model's folder (it has a config.json), whose files "
            "SGLang reads as weights; pass --out with a path outside of it"
        )


def _text(args: argparse.Namespace, settings: CalibrationSettings) -> corpus.Text:
    if args.text:
        return corpus.text_file(args.text)
    if args.dataset:
        num_chars = corpus.CHARS_PER_TOKEN * (settings.tokens or DEFAULT_TOKENS)
        return corpus.dataset_text(args.dataset, num_chars)
    return corpus.default_text()


def quality_table(dominant: DominantFCs) -> Table:
    """The held-out figures of a calibration that ``calibrate`` returned, by number of chunks."""
    provenance = dominant.provenance
    held_out = provenance["held_out"]
    table = Table(
        title=f"{dominant.model.architecture}, ranked by {provenance['ranker']} on "
        f"{provenance['text']}, judged on {held_out['text']}, K = {provenance['top_k']}"
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
        default = " *" if chunks == dominant.num_fcs else ""
        total = dominant.model.rope.num_chunks
        table.add_row(f"{chunks} of {total}{default}", *(f"{figure:.3f}" for figure in figures))
    return table
