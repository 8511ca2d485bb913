"""The ``fasa`` command. Each subcommand's code is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fasa_sglang import __version__
from fasa_sglang.errors import FasaError

# Subcommand: (module with add_arguments and run, one line of help).
COMMANDS = {
    "doctor": (
        "fasa_sglang.commands.doctor",
        "check the installation and report what would be refused",
    ),
    "calibrate": ("fasa_sglang.calibration.command", "rank a model's frequency chunks"),
    "serve": (
        "fasa_sglang.commands.serve",
        "start SGLang with FASA; calibrates a model the first time",
    ),
    "bench": ("fasa_sglang.workloads.bench.command", "measure kernels, a server or an agent loop"),
    "eval": (
        "fasa_sglang.workloads.eval.command",
        "measure the answers of a model",
    ),
    "demo": ("fasa_sglang.workloads.demo", "serve a long prompt with and without FASA"),
}


def own_command(*arguments: str) -> list[str]:
    """This command line, to be run in a process of its own.

    ``-P`` keeps the working directory, which may be a checkout, from hiding what is installed.
    """
    code = "import sys; from fasa_sglang.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-P", "-c", code, *arguments]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 only if the thing was done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="fasa", description="FASA for SGLang")
    parser.add_argument("--version", action="version", version=f"fasa-sglang {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if name in argv[:1]:
            command = importlib.import_module(module)
            command.add_arguments(subparser)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        command.run(args, rest) if args.command == "serve" else command.run(args)
    except FasaError as error:
        print(f"fasa {args.command}: {error}", file=sys.stderr)
        return 1
    return 0
