"""Entry point of SGLang's platform group: a CPU platform for FASA's torch backend."""

from __future__ import annotations

import os

from fasa_sglang.names import PLATFORM_NAME


def activate() -> str | None:
    """Offer the CPU platform to processes that name it in ``SGLANG_PLATFORM``.

    When the variable is unset, SGLang activates every installed platform; None keeps a GPU server
    on its own platform.

    Returns:
        The platform's class as ``module:name``, or None.
    """
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    # With several ranks, SGLang 0.5.17 uses any NCCL that is installed, which fails without a GPU.
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", "none")
    return "fasa_sglang.platforms.cpu:FasaCpuPlatform"
