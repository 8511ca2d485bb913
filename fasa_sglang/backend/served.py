"""What this process serves: whether FASA is on, its settings, its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasa_sglang.backend.host import attention_backends
from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs, ModelShape
from fasa_sglang.errors import ConfigError
from fasa_sglang.names import BACKEND_NAME


def uses_fasa(server_args: Any) -> bool:
    """Whether this server prefills and decodes with our backend; half a pair does not start."""
    return attention_backends(server_args) == (BACKEND_NAME, BACKEND_NAME)


def serves_on_flashinfer(runner: Any) -> bool:
    """Whether the GPU backend serves; the torch backend serves CPUs."""
    return runner.token_to_kv_pool.k_buffer[0].is_cuda


def fasa_config(model_config: Any) -> FasaConfig:
    """The server's FASA settings, read once per process and kept on SGLang's ``ModelConfig``."""
    config = getattr(model_config, "fasa_config", None)
    if config is None:
        config = FasaConfig.load(model_config.model_override_args.get("fasa"))
        model_config.fasa_config = config
    return config


def load_dominant_fcs(model_config: Any) -> tuple[DominantFCs, int]:
    """The calibration of the served model and the number of chunks to read from it.

    Read once per process, like ``fasa_config``.

    Raises:
        FasaError: The calibration is not set, is broken, belongs to another model, or has fewer
            chunks than ``num_fcs``.
    """
    loaded = getattr(model_config, "fasa_dominant_fcs", None)
    if loaded is not None:
        return loaded
    config = fasa_config(model_config)
    if config.calibration is None:
        raise ConfigError(
            "FASA needs a calibration file; run: fasa calibrate --model <model> --out FILE, and "
            "start the server with --json-model-override-args "
            '\'{"fasa": {"calibration": "FILE"}}\''
        )
    path: str | Path = config.calibration
    if path == "auto":
        path = cached_calibration(model_config.model_path, model_config.revision)
        if not path.exists():
            raise ConfigError(
                f"{model_config.model_path} has no calibration at {path}; run once: fasa serve "
                f"{model_config.model_path}"
            )
    dominant = DominantFCs.load(path)
    dominant.check_model(ModelShape.from_config(model_config.hf_config, config.interleaved), path)
    num_fcs = config.num_fcs or dominant.num_fcs
    dominant.model.check_num_fcs(num_fcs)
    model_config.fasa_dominant_fcs = dominant, num_fcs
    return dominant, num_fcs
