"""``fasa bench``: time kernels, servers, KV memory or an agent loop; try model families."""

from __future__ import annotations

import argparse

from fasa_sglang.workloads.bench import agent, memory, ops, serve
from fasa_sglang.workloads.bench.families import command as families

BENCHMARKS = {
    "ops": ops,
    "serve": serve,
    "memory": memory,
    "agent": agent,
    "families": families,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    subparsers = parser.add_subparsers(
        dest="benchmark", required=True, metavar="|".join(BENCHMARKS)
    )
    for name, module in BENCHMARKS.items():
        module.add_arguments(subparsers.add_parser(name, description=module.__doc__))


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: The benchmark cannot run here, or a result is wrong.
    """
    BENCHMARKS[args.benchmark].run(args)
