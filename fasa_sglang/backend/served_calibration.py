"""The calibration of the served model: given, found in the cache, or to be made by the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasa_sglang.backend.host import resolved_args
from fasa_sglang.backend.served import fasa_config
from fasa_sglang.calibration.job import CalibrationJob
from fasa_sglang.calibration_cache import cached_calibration, load_cached, weights_fingerprint
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.model_shape import ModelShape


def find_calibration(runner: Any, shape: ModelShape) -> DominantFCs | None:
    """Load the calibration of the served model.

    Args:
        runner: SGLang's ``ModelRunner``.
        shape: The model, as the engine finds it.

    Returns:
        None if the engine has to make the calibration.

    Raises:
        FasaError: The calibration cannot be read or belongs to another model.
    """
    if CalibrationJob.is_given():
        return None
    path = calibration_path(runner)
    automatic = fasa_config(runner.model_config).calibration == "auto"
    if path is None or (automatic and not path.exists()):
        return None
    dominant = load_cached(path) if automatic else DominantFCs.load(path)
    dominant.check_model(shape, served_fingerprint(runner), path)
    return dominant


def calibration_path(runner: Any) -> Path | None:
    """Where the calibration of the served model is, or is to be kept.

    Returns:
        None for a model with dummy weights and no given calibration: what is found out about random
        weights is not worth keeping.

    Raises:
        CalibrationError: The model's files cannot be read.
    """
    model_config = runner.model_config
    config = fasa_config(model_config)
    if config.calibration != "auto":
        return Path(config.calibration)
    if has_dummy_weights(runner):
        return None
    return cached_calibration(model_config.model_path, model_config.revision)


def has_dummy_weights(runner: Any) -> bool:
    """Whether the weights are random numbers, for measuring speed."""
    return bool(resolved_args(runner.server_args).load_format == "dummy")


def served_fingerprint(runner: Any) -> str | None:
    """The fingerprint of the served weights; None if they are random.

    Raises:
        CalibrationError: The model's files cannot be read.
    """
    if has_dummy_weights(runner):
        return None
    model_config = runner.model_config
    return weights_fingerprint(model_config.model_path, model_config.revision)
