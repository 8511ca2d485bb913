"""The ``fasa`` command. The code of a subcommand is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from fasa_sglang import __version__
from fasa_sglang.errors import FasaError

COMMANDS = {
    "doctor": (
        "fasa_sglang.commands.doctor",
        "check the installation and report what would be refused",
    ),
    "calibrate": ("fasa_sglang.commands.calibrate", "rank a model's frequency chunks"),
    "serve": (
        "fasa_sglang.commands.serve",
        "start SGLang with FASA; a model's first start calibrates it",
    ),
    "bench": ("fasa_sglang.workloads.bench.command", "measure kernels, a server or an agent loop"),
    "eval": ("fasa_sglang.workloads.eval.command", "measure the quality of a model's answers"),
    "demo": ("fasa_sglang.workloads.demo", "serve a long prompt with and without FASA"),
}
"""For each subcommand, the module that defines ``add_arguments`` and ``run``, and its help."""

TAKE_SGLANG_FLAGS = ("calibrate", "serve")
"""Subcommands that pass flags which are not their own on to SGLang."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 if the command succeeded, 1 after an error of the user's, 130 after Ctrl-C.
    """
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
    takes_rest = args.command in TAKE_SGLANG_FLAGS
    if rest and not takes_rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        command.run(args, rest) if takes_rest else command.run(args)
    except FasaError as error:
        print(f"fasa {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
