"""Which server the rows of an evaluation come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.calibration_file import FORMAT
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import FasaError
from fasa_sglang.names import BACKEND_NAME
from fasa_sglang.workloads.device import device_name
from fasa_sglang.workloads.eval.settings import Setting, needs_choosing
from fasa_sglang.workloads.serving.server_info import (
    attention_backend,
    server_device,
    server_info,
)

# Server settings that no row depends on, because every request of an evaluation sets them.
SET_BY_REQUESTS = ("calibration", "default", "selector", "budget", "max_budget")


def of_started_server(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions of rows from a server that this process starts.

    Args:
        model: Hugging Face folder or hub name.
        settings: The FASA settings that the server is started with.

    Raises:
        FasaError: A setting is invalid, or the calibration is not readable.
    """
    config = FasaConfig.load(settings)
    return {
        "server": _settings(asdict(config)),
        "calibration": _calibration(model, config.calibration, required=True),
        "device": device_name(),
        "sglang": version("sglang"),
    }


def of_running_server(url: str, model: str, settings: Sequence[Setting]) -> dict[str, Any]:
    """Conditions of rows from a server that someone else started, as the server reports them.

    A server that takes settings from the ``FASA_CONFIG`` variable does not report those.

    Args:
        url: The server's address.
        model: Hugging Face folder or hub name, to recognise its cached calibration.
        settings: What the evaluation requests; the server must allow it.

    Raises:
        FasaError: No server answers, it runs without FASA, or it does not offer the selectors.
    """
    info = server_info(url)
    backend = attention_backend(info)
    if backend != BACKEND_NAME:
        raise FasaError(
            f"the server at {url} runs the attention backend {backend}, expected {BACKEND_NAME}; "
            "start it with: fasa serve MODEL"
        )
    overrides = json.loads(info.get("json_model_override_args") or "{}")
    values = {**asdict(FasaConfig()), **overrides.get("fasa", {})}
    expected = ("any",) if needs_choosing(settings) else ("any", "fasa")
    if values["selector"] not in expected:
        raise FasaError(
            f"the server at {url} has the selector {values['selector']!r}, expected "
            f"{' or '.join(map(repr, expected))} for these --selectors; start it with: fasa serve "
            'MODEL --settings \'{"selector": "any"}\''
        )
    return {
        "server": _settings(values),
        "calibration": _calibration(model, values["calibration"], required=False),
        "device": server_device(url),
        "sglang": info["version"],
    }


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    relevant = {key: value for key, value in values.items() if key not in SET_BY_REQUESTS}
    # As a JSON file returns them, so that tuples compare equal.
    return json.loads(json.dumps(relevant))


def _calibration(model: str, path: str, required: bool) -> str:
    """What identifies a calibration.

    A cached calibration is identified by the model, which is a condition of its own, and by the
    file format, which fixes the defaults of ``fasa calibrate``. Any other is identified by a hash,
    or by its path if a running server has it on another machine.
    """
    if path == "auto" or Path(path).name == cached_calibration(model).name:
        return f"cached, format {FORMAT}"
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        if required:
            raise FasaError(f"cannot read the calibration {path} ({error.strerror})") from error
        return f"not readable here: {path}"
