"""Find the calibration of the model to serve, or make it at the model's first start."""

from __future__ import annotations

import subprocess
from pathlib import Path

from rich.console import Console

from fasa_sglang.calibration_cache import cached_calibration, create_cache_folder
from fasa_sglang.commands.server_flags import ServerFlags
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError, FasaError
from fasa_sglang.output_file import remove_stale_parts, require_writable
from fasa_sglang.own_command import own_command, sigterm_exits


def find_or_calibrate(
    flags: ServerFlags, config: FasaConfig, console: Console
) -> tuple[Path, DominantFCs, str]:
    """Load the calibration of the model, calibrating it if the cache has none.

    Args:
        flags: SGLang's flags; names the model.
        config: The server's settings.
        console: Where to announce a calibration.

    Returns:
        The file, its contents, and where it came from.

    Raises:
        FasaError: The calibration is invalid, or the model cannot be calibrated.
    """
    if config.calibration not in (None, "auto"):
        path = Path(str(config.calibration))
        return path, DominantFCs.load(path), "given"
    path = cached_calibration(flags.model_path, flags.revision)
    create_cache_folder(path.parent)
    remove_stale_parts(path.parent)
    if not path.exists():
        require_writable(path)
        _calibrate(flags, config, path, console)
        return path, DominantFCs.load(path), "made now"
    try:
        return path, DominantFCs.load(path), "kept from an earlier run"
    except CalibrationError as error:
        raise CalibrationError(
            f"the cached calibration is invalid ({error}); or delete {path} and start again"
        ) from error


def _calibrate(flags: ServerFlags, config: FasaConfig, out: Path, console: Console) -> None:
    """Run ``fasa calibrate`` in a process of its own, which leaves no model in GPU memory."""
    console.print(
        f"calibrating {flags.model_path}, once; a small model takes about a minute on a GPU and "
        "several minutes on a CPU",
        soft_wrap=True,
    )
    command = own_command("calibrate", "--model", flags.model_path, "--out", str(out))
    command += ["--no-picture", "--dtype", flags.dtype]
    if flags.revision is not None:
        command += ["--revision", flags.revision]
    if flags.trust_remote_code:
        command += ["--trust-remote-code"]
    if config.rope_layout != "auto":
        command += ["--rope-layout", config.rope_layout]
    with sigterm_exits(), subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        finally:
            # Both return at once for a process that has ended. Popen itself does not wait long
            # after Ctrl-C.
            process.terminate()
            process.wait()
    if code:
        raise FasaError(f"{flags.model_path} could not be calibrated; the lines above say why")
