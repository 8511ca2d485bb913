"""``fasa serve``: an SGLang server with FASA, its calibration found or made first.

The server is ``python -m sglang.launch_server`` with flags that anyone may give by hand; this
command fills them in, waits until it serves, and says in five lines what is in force.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.cli import own_command
from fasa_sglang.config import CHOICES, FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import ConfigError, FasaError
from fasa_sglang.layer_plan import LayerPlan
from fasa_sglang.names import PLATFORM_NAME
from fasa_sglang.ops.label_format import LABEL_FORMATS

OVERRIDES = "--json-model-override-args"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; SGLang gets the others."""
    parser.add_argument("model", help="Hugging Face folder or hub name")
    parser.add_argument("--calibration", metavar="FILE", help="default: kept from an earlier run")
    parser.add_argument("--default", choices=CHOICES["default"], help="requests that say nothing")
    parser.add_argument("--budget", type=int, help="tokens per (request, KV head) and step")
    parser.add_argument("--settings", metavar="JSON", help="any server settings, see README")
    parser.add_argument("--port", default="30000")
    parser.add_argument("--host", default="127.0.0.1")
    parser.epilog = "All other flags go to sglang.launch_server."


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Run the command until the server ends.

    Args:
        rest: Flags for SGLang.

    Raises:
        FasaError: The model, the calibration or a setting cannot be used, or the server failed.
    """
    console = Console(stderr=True)
    overrides, rest = _take_overrides(rest)
    settings = {**overrides.get("fasa", {}), **_settings(args)}
    config = FasaConfig.load(settings)
    path, origin = _calibration(args.model, config, console)
    settings["calibration"] = str(path)
    dominant = DominantFCs.load(path)
    command = [sys.executable, "-P", "-m", "sglang.launch_server", "--model-path", args.model]
    command += ["--attention-backend", "fasa", "--host", args.host, "--port", args.port]
    command += [OVERRIDES, json.dumps({**overrides, "fasa": settings})]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        command += ["--device", "cpu", "--dtype", "float32"]
        command += ["--cuda-graph-backend-decode", "disabled"]
        command += ["--cuda-graph-backend-prefill", "disabled"]
        environment = {"OMP_NUM_THREADS": "1", **environment, "SGLANG_PLATFORM": PLATFORM_NAME}
    server = subprocess.Popen([*command, *rest], env=environment)

    def stop(number: int, frame: FrameType | None) -> None:
        server.send_signal(number)

    signal.signal(signal.SIGTERM, stop)
    # The terminal sends Ctrl-C to both; the server decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    url = f"http://{args.host}:{args.port}"
    watcher = threading.Thread(
        target=_announce,
        args=(server, url, args.model, f"{path} ({origin})", config, dominant, console),
        daemon=True,
    )
    watcher.start()
    code = server.wait()
    if code not in (0, -signal.SIGTERM, -signal.SIGINT):
        raise FasaError(f"the server ended with exit code {code}; its last lines say why")


def _take_overrides(rest: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The user's own ``--json-model-override-args``, and the other flags."""
    if "--attention-backend" in rest:
        raise ConfigError("fasa serve sets --attention-backend itself; leave it out")
    for i, flag in enumerate(rest):
        name, _, value = flag.partition("=")
        if name == OVERRIDES:
            text, after = (value, i + 1) if value else (" ".join(rest[i + 1 : i + 2]), i + 2)
            return _json_object(text, OVERRIDES), rest[:i] + rest[after:]
    return {}, rest


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    given = {"calibration": args.calibration, "default": args.default, "budget": args.budget}
    settings = _json_object(args.settings, "--settings") if args.settings else {}
    return {**settings, **{key: value for key, value in given.items() if value is not None}}


def _json_object(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} does not hold valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source} must be a JSON object, got {text!r:.80}")
    return value


def _calibration(model: str, config: FasaConfig, console: Console) -> tuple[Path, str]:
    """The file to use, and where it came from."""
    if config.calibration not in (None, "auto"):
        return Path(str(config.calibration)), "given"
    path = cached_calibration(model)
    if path.exists():
        return path, "kept from an earlier run"
    console.print(f"calibrating {model}, once")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part-{os.getpid()}.safetensors")
    # In a process of its own, so that no model stays in the GPU's memory.
    command = own_command("calibrate", "--model", model, "--out", str(part))
    if config.rope_layout != "auto":
        command += ["--rope-layout", config.rope_layout]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise FasaError(f"{model} could not be calibrated; the lines above say why")
    # Last, and at once: another start may look for it at the same time.
    part.with_suffix(".png").unlink(missing_ok=True)
    part.replace(path)
    return path, "made now"


def _announce(
    server: subprocess.Popen[bytes],
    url: str,
    model: str,
    calibration: str,
    config: FasaConfig,
    dominant: DominantFCs,
    console: Console,
) -> None:
    """Wait until the server answers and say what is in force."""
    pool_tokens = None
    while pool_tokens is None:
        if server.poll() is not None:
            return
        time.sleep(1)
        pool_tokens = _pool_tokens(url)
    shape = dominant.model
    num_fcs = config.num_fcs or dominant.num_fcs
    plan = LayerPlan.of_model(shape.num_layers, config.num_dense_layers)
    label_bytes = LABEL_FORMATS[config.label_dtype].bytes_per_token(
        len(plan.selecting), shape.num_kv_heads, num_fcs
    )
    rows = {
        "model": f"{model} ({shape.architecture}, {shape.num_layers} layers, "
        f"{shape.num_kv_heads} KV heads)",
        "calibration": calibration,
        "budget": f"{config.budget} tokens, at most {config.max_budget}; default "
        f"{config.default}, sparse from {config.min_seq_len} tokens",
        "labels": f"{num_fcs} of {shape.rope.num_chunks} chunks in {config.label_dtype}, "
        f"{label_bytes:,} bytes a token",
        "pool": f"{pool_tokens:,} tokens, serving at {url}",
    }
    lines = [f"fasa {name:<11} {value}" for name, value in rows.items()]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _pool_tokens(url: str) -> int | None:
    try:
        with urllib.request.urlopen(f"{url}/server_info", timeout=5) as reply:
            info = json.load(reply)
    except (urllib.error.URLError, OSError, ValueError):
        return None
    return int(info["max_total_num_tokens"])
