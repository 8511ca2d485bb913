"""Wait until a server answers, and say in five lines what is in force."""

from __future__ import annotations

import json
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console

from fasa_sglang.commands.calibration_origin import CalibrationOrigin
from fasa_sglang.commands.server_flags import ServerFlags
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.ops.label_format import LABEL_FORMATS

POLL_INTERVAL_SEC = 1.0
TIMEOUT_SEC = 5.0


def announce(
    server: subprocess.Popen[bytes],
    flags: ServerFlags,
    config: FasaConfig,
    calibration: CalibrationOrigin,
    console: Console,
) -> None:
    """Print the five lines once the server is healthy; return without them if it ends before.

    Args:
        server: The server's process.
        flags: SGLang's flags; names the server's address and key.
        config: The server's settings.
        calibration: Where its calibration comes from; a healthy server has written the file.
        console: Where to print.
    """
    while server.poll() is None:
        try:
            _get(flags, "/health")
            pool = _pool(flags)
            break
        except OSError as error:
            refusal = _refusal(error)
            if refusal is not None:
                pool = f"size unknown ({refusal})"
                break
        time.sleep(POLL_INTERVAL_SEC)
    else:
        return
    rows = {**_rows(flags.model_path, config, calibration), "pool": pool}
    rows["pool"] += f", serving at {flags.url}"
    lines = [f"fasa {name:<11} {value}" for name, value in rows.items()]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _rows(model: str, config: FasaConfig, calibration: CalibrationOrigin) -> dict[str, str]:
    rows = {
        "model": model,
        "calibration": calibration.origin,
        "budget": f"{config.budget} tokens, at most {config.max_budget}; default "
        f"{config.default}, sparse from {config.min_seq_len} tokens",
        "labels": f"in {config.label_dtype}",
    }
    if calibration.path is None:
        return rows
    dominant = DominantFCs.load(calibration.path)
    shape = dominant.model
    num_fcs = config.num_fcs or dominant.num_fcs
    num_selecting = max(0, len(shape.layers) - config.num_dense_layers)
    label_bytes = LABEL_FORMATS[config.label_dtype].bytes_per_token(
        num_selecting, shape.num_kv_heads, num_fcs
    )
    return {
        **rows,
        "model": f"{model} ({shape.architecture}, {len(shape.layers)} of {shape.num_layers} layers "
        f"rank tokens, {shape.num_kv_heads} KV heads)",
        "calibration": f"{calibration.path} ({calibration.origin})",
        "labels": f"{num_fcs} of {shape.rotation.num_chunks} chunks in {config.label_dtype}, "
        f"{label_bytes:,} bytes a token",
    }


def _pool(flags: ServerFlags) -> str:
    """The size of a healthy server's KV pool, or why it is unknown."""
    try:
        return f"{json.loads(_get(flags, '/server_info'))['max_total_num_tokens']:,} tokens"
    except OSError as error:
        return f"size unknown (/server_info: {_refusal(error) or error})"
    except (ValueError, KeyError, TypeError):
        return "size unknown (/server_info does not tell)"


def _get(flags: ServerFlags, path: str) -> bytes:
    """Fetch a path of the server; raises ``OSError`` until it answers with success."""
    context: Any = None
    if flags.ssl_certfile:
        # Its certificate names the public host, and this machine knows whom it talks to.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    headers = {"Authorization": f"Bearer {flags.api_key}"} if flags.api_key else {}
    request = urllib.request.Request(flags.url + path, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SEC, context=context) as reply:
        content: bytes = reply.read()
    return content


def _refusal(error: OSError) -> str | None:
    """Why the server will not talk to us, however long we wait; None if it may still start."""
    if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
        return f"the server answers {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, ssl.SSLError):
        return f"TLS refused: {error.reason.reason}"
    return None
