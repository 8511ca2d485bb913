"""Entry point of SGLang's plugin group: register the attention backend and the hooks.

SGLang logs and swallows what a plugin raises. Refusals therefore happen in
``backend.create_fasa_backend``, whose message reaches the user.
"""

from __future__ import annotations

from typing import Any

from fasa_sglang.names import BACKEND_NAME


def register() -> None:
    """Register the backend and the hooks; SGLang calls this in each of its processes."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    from fasa_sglang.backend.hooks import HOOKS

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])
    register_attention_backend(BACKEND_NAME)(_create)
    for hook in HOOKS:
        HookRegistry.register(hook.target, hook.function, hook.kind)


def _create(runner: Any) -> Any:
    from fasa_sglang.backend import create_fasa_backend

    return create_fasa_backend(runner)
