"""``fasa doctor``: report the installation, the hooks, and what a server would refuse."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.commands.model_facts import describe, model_facts
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import FasaError
from fasa_sglang.names import PLATFORM_NAME
from fasa_sglang.output_file import require_writable, write_whole

OPTIONAL = ("flashinfer-python", "triton", "transformers")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        what: What was checked.
        found: The result, or why a server would be refused.
        ok: Whether a server would start.
    """

    what: str
    found: str
    ok: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", help="also check this model (Hugging Face folder or hub name)")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="also check this calibration; auto is the model's in the cache of fasa serve",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: A server would be refused, as the table says, or the report cannot be written.
    """
    if args.json:
        require_writable(Path(args.json))
    logging.disable(logging.WARNING)
    findings = [
        Finding("fasa-sglang", __version__),
        Finding("python", platform.python_version()),
        *_packages(),
        _check("device", _device),
        _check("entry points", _entry_points),
        _check("hooks", _hooks),
        _check("configuration", lambda: _configuration(args.model, args.calibration)),
    ]
    if args.model:
        findings.append(_check("model", lambda: _model(args.model, args.calibration)))
    table = Table(title="fasa doctor")
    for heading in ("what", "found", ""):
        table.add_column(heading)
    for finding in findings:
        table.add_row(finding.what, finding.found, "ok" if finding.ok else "[red]refused[/red]")
    Console().print(table)
    if args.json:
        rows = [asdict(finding) for finding in findings]
        write_whole(Path(args.json), (json.dumps(rows, indent=2) + "\n").encode())
    refused = [finding.what for finding in findings if not finding.ok]
    if refused:
        raise FasaError(f"a server would be refused because of: {', '.join(refused)}")


def _check(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, check())
    except (FasaError, ImportError) as error:
        return Finding(what, str(error), ok=False)


def _packages() -> list[Finding]:
    findings = []
    for name in ("sglang", "torch", *OPTIONAL):
        try:
            findings.append(Finding(name, version(name)))
        except PackageNotFoundError:
            required = name not in OPTIONAL
            remedy = "; pip install 'fasa-sglang[serve]'" if required else ""
            findings.append(Finding(name, f"not installed{remedy}", ok=not required))
    return findings


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME:
        return f"cpu, SGLANG_PLATFORM={PLATFORM_NAME}"
    return (
        f"cpu; to serve on it, set SGLANG_PLATFORM={PLATFORM_NAME} and OMP_NUM_THREADS=1, as fasa "
        "serve does"
    )


def _entry_points() -> str:
    groups = {"sglang.srt.plugins": "fasa", "sglang.srt.platforms": PLATFORM_NAME}
    missing = [
        f"{group}:{name}"
        for group, name in groups.items()
        if name not in entry_points(group=group).names
    ]
    if missing:
        raise FasaError(f"{', '.join(missing)} not registered; reinstall fasa-sglang with pip")
    enabled = os.environ.get("SGLANG_PLUGINS")
    if enabled is not None and "fasa" not in enabled.split(","):
        raise FasaError(f"SGLANG_PLUGINS={enabled} disables fasa; add it or unset the variable")
    return ", ".join(f"{group}:{name}" for group, name in groups.items())


def _hooks() -> str:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # Imported after the hooks are applied: these modules import what the hooks replace.
    from fasa_sglang.backend.hooks import HOOKS
    from fasa_sglang.backend.host import SUPPORTED_VERSIONS
    from fasa_sglang.backend.refusals import missing_hooks
    from fasa_sglang.frontend import frontend_hooks, missing_frontend_hooks

    missing = missing_hooks() + missing_frontend_hooks()
    if missing:
        raise FasaError(f"cannot hook {', '.join(missing)}; use {SUPPORTED_VERSIONS}")
    count = len(HOOKS) + len(frontend_hooks())
    return f"{count} of {count} applied"


def _configuration(model: str | None, calibration: str | None) -> str:
    config = _config(calibration)
    settings = f"default {config.default}, budget {config.budget}"
    path = _calibration_path(config, model)
    if path is None:
        return f"{settings}, calibration auto; pass --model to look it up in the cache"
    if config.calibration == "auto" and not path.exists():
        return f"{settings}, calibration auto: none yet, the server makes it at its first start"
    dominant = DominantFCs.load(path)
    return (
        f"{settings}, {path}: {dominant.model.architecture}, {dominant.num_fcs} of "
        f"{dominant.model.rotation.num_chunks} chunks {_origin(dominant.provenance)}"
    )


def _config(calibration: str | None) -> FasaConfig:
    return FasaConfig.load({"calibration": calibration} if calibration is not None else None)


def _calibration_path(config: FasaConfig, model: str | None) -> Path | None:
    """The calibration that the settings name; None if that takes a model's name, and there is none.

    The file may not exist yet.
    """
    if config.calibration != "auto":
        return Path(config.calibration)
    return None if model is None else cached_calibration(model)


def _origin(provenance: dict[str, Any]) -> str:
    if "ranker" not in provenance:
        return "(the file does not say how they were ranked)"
    return f"by {provenance['ranker']} on {provenance.get('text')}"


def _model(model: str, calibration: str | None) -> str:
    from transformers import AutoConfig

    config = _config(calibration)
    try:
        model_config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FasaError(
            f"cannot read the config of {model} ({reason}); expected a Hugging Face folder or hub "
            "name"
        ) from error
    path = _calibration_path(config, model)
    dominant = None
    if path is not None and (config.calibration != "auto" or path.exists()):
        dominant = DominantFCs.load(path)
    return describe(model_facts(model_config), config, dominant)
