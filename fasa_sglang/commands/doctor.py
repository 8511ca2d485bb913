"""``fasa doctor``: what is installed, what is hooked, and what would be refused and why."""

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

from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs, ModelShape
from fasa_sglang.errors import FasaError
from fasa_sglang.names import PLATFORM_NAME

OPTIONAL = ("flashinfer-python", "triton", "transformers")


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``ok`` is False if it stands in FASA's way."""

    what: str
    found: str
    ok: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", help="also check this model's config (folder or hub name)")
    parser.add_argument("--calibration", metavar="FILE", help="also check this calibration file")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: Something stands in FASA's way; the table says what.
    """
    logging.disable(logging.WARNING)
    findings = [
        Finding("fasa-sglang", __version__),
        Finding("python", platform.python_version()),
        *_packages(),
        _check("device", _device),
        _check("entry points", _entry_points),
        _check("hooks", _hooks),
        _check("configuration", lambda: _configuration(args.calibration)),
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
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    bad = [finding.what for finding in findings if not finding.ok]
    if bad:
        raise FasaError(f"FASA would not serve here because of: {', '.join(bad)}")


def _check(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, look())
    except (FasaError, ImportError) as error:
        return Finding(what, str(error), ok=False)


def _packages() -> list[Finding]:
    findings = []
    for name in ("sglang", "torch", *OPTIONAL):
        try:
            findings.append(Finding(name, version(name)))
        except PackageNotFoundError:
            needed = name not in OPTIONAL
            way_out = "not installed" + ("; pip install 'fasa-sglang[serve]'" if needed else "")
            findings.append(Finding(name, way_out, ok=not needed))
    return findings


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected == PLATFORM_NAME:
        return f"cpu, SGLANG_PLATFORM={PLATFORM_NAME}"
    return f"cpu; to serve on it set SGLANG_PLATFORM={PLATFORM_NAME} and OMP_NUM_THREADS=1"


def _entry_points() -> str:
    groups = {"sglang.srt.plugins": "fasa", "sglang.srt.platforms": PLATFORM_NAME}
    missing = [
        f"{group}:{name}"
        for group, name in groups.items()
        if name not in entry_points(group=group).names
    ]
    if missing:
        raise FasaError(f"{', '.join(missing)} not registered; reinstall fasa-sglang with pip")
    chosen = os.environ.get("SGLANG_PLUGINS")
    if chosen is not None and "fasa" not in chosen.split(","):
        raise FasaError(f"SGLANG_PLUGINS={chosen} leaves fasa out; add it or unset the variable")
    return ", ".join(f"{group}:{name}" for group, name in groups.items())


def _hooks() -> str:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # After the plugins: these modules import much of SGLang, which the hooks reach by name.
    from fasa_sglang.backend.hooks import HOOKS
    from fasa_sglang.backend.refusals import missing_hooks
    from fasa_sglang.frontend import frontend_hooks, missing_frontend_hooks

    missing = missing_hooks() + missing_frontend_hooks()
    if missing:
        raise FasaError(f"cannot hook {', '.join(missing)}; use SGLang 0.5.17 to 0.5.23")
    count = len(HOOKS) + len(frontend_hooks())
    return f"{count} of {count} applied"


def _configuration(calibration: str | None) -> str:
    config = FasaConfig.load({"calibration": calibration} if calibration else None)
    if config.calibration is None:
        return f"default {config.default}, budget {config.budget}, no calibration set"
    dominant = DominantFCs.load(config.calibration)
    made = dominant.provenance
    return (
        f"default {config.default}, budget {config.budget}, {config.calibration}: "
        f"{dominant.model.architecture}, {dominant.num_fcs} of {dominant.model.rope.num_chunks} "
        f"chunks by {made['ranker']} on {made['text']}"
    )


def _model(model: str, calibration: str | None) -> str:
    from transformers import AutoConfig

    config = FasaConfig.load({"calibration": calibration} if calibration else None)
    try:
        shape = ModelShape.from_config(AutoConfig.from_pretrained(model), config.interleaved)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FasaError(f"cannot read the config of {model} ({reason})") from error
    if config.calibration is not None:
        DominantFCs.load(config.calibration).check_model(shape, config.calibration)
    rope = shape.rope
    layout = "interleaved" if rope.interleaved else "NeoX"
    return (
        f"{shape.architecture}: {shape.num_layers} layers, {shape.num_qo_heads} query and "
        f"{shape.num_kv_heads} KV heads of {rope.head_dim}, {layout} RoPE over {rope.rotary_dim}, "
        f"{rope.num_chunks} frequency chunks"
    )
