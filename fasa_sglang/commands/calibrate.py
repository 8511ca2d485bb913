"""``fasa calibrate``: write a model's calibration, a picture of it, and a table.

The calibration is made by an SGLang engine that serves the model, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fasa_sglang.calibration import corpus
from fasa_sglang.calibration.heatmap import save_heatmap
from fasa_sglang.calibration.job import CalibrationJob
from fasa_sglang.calibration.rankers import RANKERS
from fasa_sglang.calibration.settings import DEFAULT_TOKENS, DEFAULT_TOP_K, CalibrationSettings
from fasa_sglang.calibration_cache import model_fingerprint
from fasa_sglang.commands.device_flags import device_environment, device_flags
from fasa_sglang.commands.server_flags import parse_server_flags, pass_flags_on
from fasa_sglang.config import ENV, OVERRIDES_FLAG
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError, FasaError
from fasa_sglang.names import BACKEND_NAME
from fasa_sglang.output_file import require_writable, write_whole
from fasa_sglang.own_command import sigterm_exits

_OUR_ERROR = re.compile(r"fasa_sglang\.errors\.\w+: (.+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; all others are SGLang's."""
    defaults = CalibrationSettings()
    pass_flags_on(parser, "fasa calibrate", "--tp-size, --dtype, --quantization")
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
        help=f"length of the text; default: {DEFAULT_TOKENS}, or less if the model's context or "
        "the KV pool is shorter",
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
    parser.add_argument("--json", metavar="FILE", help="write the provenance as JSON")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Run the command.

    Args:
        args: The command's own arguments.
        rest: The model and SGLang's flags.

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
    for path in (args.out, args.json):
        if path is not None:
            require_writable(Path(path))
    environment = device_environment(os.environ)
    flags = parse_server_flags(rest, environment)
    out = Path(args.out or f"{Path(flags.model_path).resolve().name}.fasa")
    _require_outside_models(out)
    require_writable(out)
    if flags.load_format != "dummy":
        # A model that cannot be found is one sentence here, and a traceback in the engine.
        model_fingerprint(flags.model_path, flags.revision)
    job = CalibrationJob(_text(args, settings), str(out.resolve()), settings)
    # Settings of a server have no part in a calibration, and may not suit this model.
    environment.pop(ENV, None)
    overrides = {name: value for name, value in flags.overrides.items() if name != "fasa"}
    command = [sys.executable, "-P", "-m", "fasa_sglang.commands.calibrating_engine"]
    command += [*device_flags(), "--log-level", "warning", *flags.argv]
    command += ["--attention-backend", BACKEND_NAME, OVERRIDES_FLAG, json.dumps(overrides)]
    if "--cuda-graph-backend-decode" not in command:
        # No token is decoded here, and capturing graphs takes a minute.
        command += ["--cuda-graph-backend-decode", "disabled"]
        command += ["--cuda-graph-backend-prefill", "disabled"]
    with tempfile.TemporaryDirectory() as work:
        environment |= job.environment(Path(work) / "text")
        _run_engine(command, environment, flags.model_path)
    dominant = DominantFCs.load(out)
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


def _run_engine(command: list[str], environment: dict[str, str], model: str) -> None:
    """Run the engine to its end, and show what it prints.

    Raises:
        FasaError: It failed; with the engine's own sentence, if it is one of ours.
    """
    reason = "the lines above say why"
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with sigterm_exits(), process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                sys.stderr.write(line)
                sys.stderr.flush()
                found = _OUR_ERROR.search(line)
                reason = found[1] if found else reason
            code = process.wait()
        finally:
            # The engine's processes are one group, which has ended unless this one was interrupted.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        raise FasaError(f"{model} could not be calibrated: {reason}")


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
        total = dominant.model.rotation.num_chunks
        table.add_row(f"{chunks} of {total}{default}", *(f"{figure:.3f}" for figure in figures))
    return table
