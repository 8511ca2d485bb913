"""What this process serves: whether FASA is on, and its settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_serving

from fasa_sglang.backend.host import attention_backends, full_attention_pool
from fasa_sglang.config import ENV, FasaConfig
from fasa_sglang.errors import RequestError
from fasa_sglang.names import BACKEND_NAME
from fasa_sglang.requests import FasaRequest, parse_request


def uses_fasa(server_args: Any) -> bool:
    """Whether decode runs on our backend; a server on which only prefill does not start."""
    return attention_backends(server_args)[1] == BACKEND_NAME


def serves_on_flashinfer(runner: Any) -> bool:
    """Whether the FlashInfer backend serves this runner, and not the torch backend for CPUs."""
    return full_attention_pool(runner.token_to_kv_pool).k_buffer[0].is_cuda


def fasa_config(model_config: Any) -> FasaConfig:
    """The server's FASA settings, read once per process and stored on SGLang's ``ModelConfig``.

    Raises:
        ConfigError: The settings cannot be used.
    """
    config = getattr(model_config, "fasa_config", None)
    if config is None:
        config = FasaConfig.load(model_config.model_override_args.get("fasa"))
        model_config.fasa_config = config
    return config


def read_settings_at_start(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """Read the settings when SGLang's ``TokenizerManager`` is created, before any request.

    Raises:
        ConfigError: The settings cannot be used.
    """
    if uses_fasa(manager.server_args):
        fasa_config(manager.model_config)


def launch_with_fixed_settings(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Launch a server's processes with the content of a settings file instead of its path.

    All processes then read the same settings, even if the file is edited while they start. A path
    that cannot be read is left for ``FasaConfig.load`` to refuse.
    """
    value = os.environ.get(ENV, "").strip()
    if not value or value.startswith("{"):
        return original(*args, **kwargs)
    try:
        content = Path(value).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return original(*args, **kwargs)
    if not content.startswith("{"):
        return original(*args, **kwargs)
    os.environ[ENV] = content
    try:
        return original(*args, **kwargs)
    finally:
        os.environ[ENV] = value


def served_request(
    custom_params: Any, config: FasaConfig, prompt_len: int, beam_search: bool
) -> FasaRequest | None:
    """``parse_request`` for this server: also refuses what only its flags rule out.

    Raises:
        RequestError: See ``parse_request``, or the server cannot tell where thinking ends.
    """
    request = parse_request(custom_params, config, prompt_len, beam_search)
    if request is None or request.prune != "think":
        return request
    if not (get_serving().reasoning_parser or config.think_end_ids):
        raise RequestError(
            "fasa.prune='think' needs to know where thinking ends; start the server with "
            "--reasoning-parser or with the setting think_end_ids, or use 'generated'"
        )
    return request
