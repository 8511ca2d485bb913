"""Serve a tiny random model of every model family, and write what happened as a table.

Each model is served once, and its replies with a budget that covers the whole context must be those
of dense decoding. The outcomes are stored per device, so that the table shows runs on a CPU and on
a GPU together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.bench.families.processes import run_trials
from fasa_sglang.workloads.bench.families.report import load_trials, save_trials, write_page
from fasa_sglang.workloads.bench.families.trial import Trial
from fasa_sglang.workloads.models.families.table import FAMILIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"default: all of {', '.join(FAMILIES)}"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the outcomes, one file per device; the table goes beside it, with .md",
    )
    parser.add_argument(
        "--only-table", action="store_true", help="write the table of the outcomes that are there"
    )


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: A name is unknown, or a model was not served as the table of families says.
    """
    unknown = [name for name in args.families if name not in FAMILIES]
    if unknown:
        raise FasaError(f"unknown families {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problems = {}

    def report(name: str, trial: Trial) -> None:
        save_trials(args.out, device, {**load_trials(args.out, device), name: trial})
        found = trial.problems(FAMILIES[name], device)
        print(f"{name}: {trial.summary}" + "".join(f"\n  {text}" for text in found), flush=True)
        if found:
            problems[name] = found

    if not args.only_table:
        run_trials(args.families or FAMILIES, report)
    write_page(args.out)
    if problems:
        raise FasaError(
            f"{len(problems)} families are not as the table of families says: {', '.join(problems)}"
        )
