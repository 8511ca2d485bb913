"""The cache of calibrations, for servers with ``calibration="auto"``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from fasa_sglang.calibration_file import FORMAT
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError, FasaError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
"""Formats of weights, in the order in which SGLang looks for them."""

EDGE_BYTES = 65536
"""How much of either end of a weight file enters the fingerprint."""


def cache_dir() -> Path:
    """The folder of FASA's cache, ``fasa-sglang`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fasa-sglang"


def create_cache_folder(folder: Path) -> None:
    """Create a folder of the cache.

    Raises:
        FasaError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FasaError(
            f"cannot create the cache folder {folder} ({error.strerror}); set XDG_CACHE_HOME to a "
            "writable folder"
        ) from error


def cached_calibration(model: str, revision: str | None = None) -> Path:
    """The path of a model's calibration in the cache, whether it exists or not.

    Args:
        model: Hugging Face folder or hub name.
        revision: Branch, tag or commit of a hub model.

    Raises:
        CalibrationError: The model does not exist.
    """
    name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")
    # The format is part of the name, so that an older calibration is not used.
    file = f"{name}-{model_fingerprint(model, revision)}-{FORMAT}.fasa"
    return cache_dir() / "calibrations" / file


def load_cached(path: Path) -> DominantFCs:
    """Load a calibration of the cache.

    Raises:
        CalibrationError: The file is invalid; the message says how to get rid of it.
    """
    try:
        return DominantFCs.load(path)
    except CalibrationError as error:
        raise CalibrationError(
            f"the cached calibration is invalid ({error}); or delete {path} and start again"
        ) from error


def model_fingerprint(model: str, revision: str | None = None) -> str:
    """Identify a model by its contents, so that a fine-tune differs from its base model.

    A folder is identified by its config and its weights, a hub model by its commit.

    Args:
        model: Hugging Face folder or hub name.
        revision: Branch, tag or commit of a hub model.

    Raises:
        CalibrationError: The model does not exist.
    """
    folder = Path(model)
    digest = hashlib.sha256()
    if folder.is_dir():
        try:
            digest.update((folder / "config.json").read_bytes())
        except OSError as error:
            raise CalibrationError(
                f"{model} has no readable config.json ({error.strerror}); expected a Hugging Face "
                "folder or hub name"
            ) from error
        for path in _weight_files(folder):
            _add_file(digest, path)
    else:
        digest.update(f"{model}@{_snapshot(model, revision).name}".encode())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: str, revision: str | None = None) -> str | None:
    """Identify a model's weights by the name, size and both ends of each of their files.

    A model has the same fingerprint in the hub's cache and in a folder of its own.

    Args:
        model: Hugging Face folder, or hub name of a model that has been downloaded.
        revision: Branch, tag or commit of a hub model.

    Returns:
        None if there are no weight files, as for a model with dummy weights.

    Raises:
        CalibrationError: The model does not exist.
    """
    folder = Path(model) if Path(model).is_dir() else _snapshot(model, revision)
    files = _weight_files(folder)
    digest = hashlib.sha256()
    for path in files:
        _add_file(digest, path)
    return digest.hexdigest()[:16] if files else None


def _weight_files(folder: Path) -> list[Path]:
    """A model's weight files in the first of the formats that it has, sorted."""
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(path for path in folder.iterdir() if path.suffix == suffix)
        if files:
            return files
    return []


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}:".encode())
    with path.open("rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read())


def _snapshot(model: str, revision: str | None) -> Path:
    """The folder of a hub model in the hub's local cache, whose name is the commit.

    The hub is asked for the newest commit if it can be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # The path is .../snapshots/<commit>/config.json.
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(
            f"cannot load the model {model} ({reason}); expected a Hugging Face folder or hub name"
        ) from error
