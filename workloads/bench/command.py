"""``fasa bench``: ``ops`` times kernels, ``serve`` and ``memory`` the server, ``agent`` a use."""

from __future__ import annotations

import argparse

from fasa_sglang.workloads.bench import agent, memory, ops, serve

PARTS = {"ops": ops, "serve": serve, "memory": memory, "agent": agent}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    subparsers = parser.add_subparsers(dest="what", required=True, metavar="|".join(PARTS))
    for name, module in PARTS.items():
        module.add_arguments(subparsers.add_parser(name, description=module.__doc__))


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: It cannot be measured here, or a result is wrong.
    """
    PARTS[args.what].run(args)
