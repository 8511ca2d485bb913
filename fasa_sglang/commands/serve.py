"""``fasa serve``: an SGLang server with FASA, which calibrates itself at the model's first start.

The server is ``python -m sglang.launch_server``. This command adds the flags and settings that FASA
needs, waits until the server is healthy, and prints five lines about what is in force.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

from rich.console import Console

from fasa_sglang.commands.announcement import announce
from fasa_sglang.commands.calibration_origin import calibration_origin
from fasa_sglang.commands.device_flags import device_environment, device_flags
from fasa_sglang.commands.server_flags import parse_server_flags, pass_flags_on
from fasa_sglang.config import (
    CHOICES,
    ENV,
    OVERRIDES_FLAG,
    FasaConfig,
    check_keys,
    environment_settings,
    json_object,
)
from fasa_sglang.errors import FasaError
from fasa_sglang.names import BACKEND_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; all others are SGLang's."""
    pass_flags_on(parser, "fasa serve", "--port, --host, --tp-size")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="file of fasa calibrate; default: the one in the cache, made at the first start",
    )
    parser.add_argument(
        "--default",
        choices=CHOICES["default"],
        help="what to do with requests that do not set fasa; auto is on from min_seq_len tokens",
    )
    parser.add_argument("--budget", type=int, help="tokens per (request, KV head) and step")
    parser.add_argument("--settings", metavar="JSON", help="FASA server settings, as JSON")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Run the command until the server ends.

    Args:
        args: The command's own arguments.
        rest: The model and SGLang's flags.

    Raises:
        FasaError: A flag or setting is invalid, or the server failed.
    """
    console = Console(stderr=True)
    environment = device_environment(os.environ)
    flags = parse_server_flags(rest, environment)
    settings = _settings(args, flags.overrides)
    config = FasaConfig(**settings)
    origin = calibration_origin(flags, config)
    # All settings are in the flag: a process that read the variable's file later could differ.
    environment.pop(ENV, None)
    command = [sys.executable, "-P", "-m", "sglang.launch_server"]
    command += [*device_flags(), *flags.argv, "--attention-backend", BACKEND_NAME]
    command += [OVERRIDES_FLAG, json.dumps({**flags.overrides, "fasa": settings})]
    server = subprocess.Popen(command, env=environment)
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # A terminal sends Ctrl-C to both processes, and the server decides when to end.
        if number != signal.SIGINT:
            server.send_signal(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threading.Thread(
        target=announce,
        args=(server, flags, config, origin, console),
        daemon=True,
    ).start()
    code = server.wait()
    if code in (0, -signal.SIGTERM, -signal.SIGINT):
        return
    if received:
        # A server that is stopped while it starts may fail in many ways, none of them a fault.
        sys.exit(128 + received[0])
    raise FasaError(f"the server ended with exit code {code}; its last lines say why")


def _settings(args: argparse.Namespace, overrides: dict[str, Any]) -> dict[str, Any]:
    """The settings from all sources, the last of which has precedence."""
    flags = {"calibration": args.calibration, "default": args.default, "budget": args.budget}
    inline = json_object(args.settings, "--settings") if args.settings is not None else {}
    return {
        **environment_settings(),
        **check_keys(overrides.get("fasa"), OVERRIDES_FLAG),
        **check_keys(inline, "--settings"),
        **{name: value for name, value in flags.items() if value is not None},
    }
