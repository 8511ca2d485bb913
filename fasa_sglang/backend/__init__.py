"""FASA inside SGLang. Importing this package imports no SGLang; ``create_fasa_backend`` does."""

from __future__ import annotations

from typing import Any


def create_fasa_backend(runner: Any) -> Any:
    """Build the attention backend of one model runner, or refuse with one sentence.

    Args:
        runner: SGLang's ``ModelRunner``, its KV pool allocated.

    Raises:
        FasaError: The server, model, configuration or calibration cannot work.
    """
    from fasa_sglang.backend.host import fasa_config, require_supported_host
    from fasa_sglang.backend.torch_backend import FasaTorchAttnBackend

    require_supported_host(runner)
    return FasaTorchAttnBackend(runner, fasa_config(runner.model_config))
