"""The file format of a calibration: tensors and one JSON object in the safetensors format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fasa_sglang.errors import CalibrationError
from fasa_sglang.output_file import write_whole

FORMAT = 4
"""Version of the format. Also raised when new defaults call for new cached calibrations."""

METADATA_KEY = "fasa"
"""Key of the JSON object in the file's metadata.

There is only one key because safetensors does not keep the order of several, and equal calibrations
must be equal byte by byte.
"""

MAX_BYTES = 256 * 2**20
"""Upper bound of a file's size, checked before reading; that of a 405B model is below 8 MiB."""

REMEDY = "run: fasa calibrate --model <model> --out <file>"


def write_calibration(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write a calibration file; equal contents give equal bytes.

    Raises:
        FasaError: The file cannot be written.
    """
    metadata = {METADATA_KEY: json.dumps({**about, "format": FORMAT}, sort_keys=True)}
    write_whole(path, save(tensors, metadata=metadata))


def read_calibration(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a calibration file, without judging what it says.

    Returns:
        The tensors by name, and the JSON object.

    Raises:
        CalibrationError: The file cannot be read, is not a calibration, or has another format.
    """
    try:
        if path.exists() and not path.is_file():
            raise CalibrationError(
                f"the calibration {path} is not a regular file, expected one written by fasa "
                f"calibrate; {REMEDY}"
            )
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CalibrationError(
                f"{path} has {size:,} bytes, expected a calibration of at most {MAX_BYTES:,}; "
                f"{REMEDY}"
            )
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"cannot read the calibration file {path} ({error.strerror}); {REMEDY}"
        ) from error
    try:
        tensors = load(data)
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__") or {}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{path} is truncated or not a safetensors file ({error}); {REMEDY}"
        ) from error
    if METADATA_KEY not in metadata:
        raise CalibrationError(
            f"{path} is a safetensors file without FASA's metadata, expected one written by fasa "
            f"calibrate; {REMEDY}"
        )
    try:
        about = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} has broken metadata ({error}); {REMEDY}") from error
    if not isinstance(about, dict) or "format" not in about:
        raise CalibrationError(f"{path} has broken metadata (no format); {REMEDY}")
    if about["format"] != FORMAT:
        raise CalibrationError(
            f"{path} has calibration format {about['format']!r:.80}, this version reads format "
            f"{FORMAT}; {REMEDY}"
        )
    return tensors, about
