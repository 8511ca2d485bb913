"""``fasa serve``: an SGLang server with FASA, calibrated at the model's first start.

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

import torch
from rich.console import Console

from fasa_sglang.commands.announcement import announce
from fasa_sglang.commands.first_calibration import find_or_calibrate
from fasa_sglang.commands.server_flags import parse_server_flags
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
from fasa_sglang.names import BACKEND_NAME, PLATFORM_NAME

CPU_FLAGS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; all others are SGLang's."""
    parser.usage = "fasa serve MODEL [options] [flags of sglang.launch_server]"
    # An abbreviation could also be a flag of SGLang.
    parser.allow_abbrev = False
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
    parser.epilog = (
        "MODEL is a Hugging Face folder or hub name, before or after the flags, or --model-path. "
        "--port, --host, --tp-size and all other flags are those of sglang.launch_server."
    )


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Run the command until the server ends.

    Args:
        args: The command's own arguments.
        rest: The model and SGLang's flags.

    Raises:
        FasaError: A flag or setting is invalid, the model cannot be calibrated, or the server
            failed.
    """
    console = Console(stderr=True)
    environment = dict(os.environ)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        environment = {"OMP_NUM_THREADS": "1", **environment, "SGLANG_PLATFORM": PLATFORM_NAME}
    flags = parse_server_flags(rest, environment)
    settings = _settings(args, flags.overrides)
    config = FasaConfig(**settings)
    path, dominant, origin = find_or_calibrate(flags, config, console)
    settings["calibration"] = str(path)
    # All settings are in the flag: a process that read the variable's file later could differ.
    environment.pop(ENV, None)
    command = [sys.executable, "-P", "-m", "sglang.launch_server"]
    command += [*(CPU_FLAGS if on_cpu else ()), *flags.argv, "--attention-backend", BACKEND_NAME]
    command += [OVERRIDES_FLAG, json.dumps({**flags.overrides, "fasa": settings})]
    server = subprocess.Popen(command, env=environment)

    def forward(number: int, frame: FrameType | None) -> None:
        server.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    # A terminal sends Ctrl-C to both processes, and the server decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    calibration = f"{path} ({origin})"
    threading.Thread(
        target=announce,
        args=(server, flags, calibration, config, dominant, console),
        daemon=True,
    ).start()
    code = server.wait()
    if code not in (0, -signal.SIGTERM, -signal.SIGINT):
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
