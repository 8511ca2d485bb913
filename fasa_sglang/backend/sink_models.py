"""Models with attention sinks, for which SGLang accepts a fixed list of attention backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fasa_sglang.backend.served import uses_fasa

# SGLang refuses these unless the backend is one whose attention has sinks. FASA's has them on GPUs;
# on CPUs ``refusals`` says that it has none.
ARCHITECTURES = frozenset({"GptOssForCausalLM"})
ACCEPTED_BACKEND = "triton"


def accept_backend_with_sinks(original: Callable[..., Any], server_args: Any) -> Any:
    """Let SGLang check the flags of a model with sinks as for a backend that has them."""
    from sglang.srt.arg_groups import model_hook
    from sglang.srt.arg_groups.model_override_base import model_config_of

    if not uses_fasa(server_args):
        return original(server_args)
    architectures = model_config_of(server_args).hf_config.architectures or []
    if ARCHITECTURES.isdisjoint(architectures):
        return original(server_args)
    check = model_hook.attention_backends_of
    model_hook.attention_backends_of = lambda view: (ACCEPTED_BACKEND, ACCEPTED_BACKEND)
    try:
        return original(server_args)
    finally:
        model_hook.attention_backends_of = check
