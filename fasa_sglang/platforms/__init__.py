"""Entry point of SGLang's platform group: the CPU platform for FASA's reference backend."""

from __future__ import annotations

import os

from fasa_sglang.names import PLATFORM_NAME


def activate() -> str | None:
    """Offer the CPU platform, but only to a process that names it in ``SGLANG_PLATFORM``.

    SGLang activates every installed platform when the variable is unset; answering None then
    keeps a GPU server on its own platform.
    """
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    return "fasa_sglang.platforms.cpu:FasaCpuPlatform"
