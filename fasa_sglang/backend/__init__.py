"""FASA inside SGLang. Importing this package imports no SGLang; ``create_fasa_backend`` does."""

from __future__ import annotations

from typing import Any


def create_fasa_backend(runner: Any) -> Any:
    """Build the attention backend of one model runner, or refuse the server in one sentence.

    Args:
        runner: SGLang's ``ModelRunner``, its KV pool allocated.

    Raises:
        FasaError: FASA does not support the server, its settings, the model or the calibration.
    """
    from fasa_sglang.backend.refusals import require_supported_host
    from fasa_sglang.backend.served import fasa_config, serves_on_flashinfer

    require_supported_host(runner)
    config = fasa_config(runner.model_config)
    if serves_on_flashinfer(runner):
        from fasa_sglang.backend.attention.flashinfer_backend import FasaFlashInferAttnBackend

        return FasaFlashInferAttnBackend(runner, config)
    from fasa_sglang.backend.attention.torch_backend import FasaTorchAttnBackend

    return FasaTorchAttnBackend(runner, config)
