"""Where the calibration of a server comes from, checked before SGLang is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fasa_sglang.calibration_cache import cached_calibration, create_cache_folder, load_cached
from fasa_sglang.commands.server_flags import ServerFlags
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.output_file import require_writable


@dataclass(frozen=True)
class CalibrationOrigin:
    """A server's calibration.

    Args:
        path: Its file, which the server may have yet to write; None if it is not kept.
        origin: Where it comes from, for the announcement.
    """

    path: Path | None
    origin: str


def calibration_origin(flags: ServerFlags, config: FasaConfig) -> CalibrationOrigin:
    """Find the calibration that a server will use.

    Args:
        flags: SGLang's flags; names the model.
        config: The server's settings.

    Raises:
        FasaError: The file cannot be read, or the cache cannot be written.
    """
    if config.calibration != "auto":
        path = Path(config.calibration)
        DominantFCs.load(path)
        return CalibrationOrigin(path, "given")
    if flags.load_format == "dummy":
        return CalibrationOrigin(None, "of random weights, not kept")
    path = cached_calibration(flags.model_path, flags.revision)
    if path.exists():
        load_cached(path)
        return CalibrationOrigin(path, "kept from an earlier run")
    create_cache_folder(path.parent)
    require_writable(path)
    return CalibrationOrigin(path, "made now")
