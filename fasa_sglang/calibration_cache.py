"""Calibrations kept per model, for servers that are told ``calibration="auto"``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fasa_sglang.dominant_fcs import FORMAT
from fasa_sglang.errors import CalibrationError

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
# Of every weight file, this much of both ends goes into the fingerprint.
EDGE_BYTES = 65536


def cache_dir() -> Path:
    """Where FASA keeps files: ``$XDG_CACHE_HOME`` or ``~/.cache``, below ``fasa-sglang``."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fasa-sglang"


def cached_calibration(model: str) -> Path:
    """Where the calibration of a model is kept, whether it is there or not.

    Args:
        model: Hugging Face folder or hub name.

    Raises:
        CalibrationError: There is no such model.
    """
    name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")
    # One of an older format is made anew.
    file = f"{name}-{model_fingerprint(model)}-{FORMAT}.safetensors"
    return cache_dir() / "calibrations" / file


def model_fingerprint(model: str) -> str:
    """Tell models apart by what they hold, so that a fine-tune is not taken for its base.

    A folder is known by its config and by name, size, beginning and end of its weight files; a hub
    model by its commit.

    Raises:
        CalibrationError: There is no such model.
    """
    folder = Path(model)
    digest = hashlib.sha256()
    if folder.is_dir():
        try:
            digest.update((folder / "config.json").read_bytes())
        except OSError as error:
            raise CalibrationError(
                f"{model} holds no readable config.json ({error.strerror}); expected a Hugging "
                "Face folder or hub name"
            ) from error
        for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                digest.update(file.read(EDGE_BYTES))
                file.seek(max(0, size - EDGE_BYTES))
                digest.update(file.read())
    else:
        digest.update(f"{model}@{_commit(model)}".encode())
    return digest.hexdigest()[:16]


def _commit(model: str) -> str:
    """The commit of a hub model that is or can be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # .../snapshots/<commit>/config.json
        return Path(hf_hub_download(model, "config.json")).parent.name
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(
            f"cannot load the model {model} ({reason}); expected a Hugging Face folder or hub name"
        ) from error
