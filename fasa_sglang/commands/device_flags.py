"""What SGLang's processes need to be told on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fasa_sglang.names import PLATFORM_NAME

CPU_FLAGS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
)


def device_flags() -> list[str]:
    """SGLang's flags for this machine; put before the user's, they can be overridden."""
    return [] if torch.cuda.is_available() else [*CPU_FLAGS]


def device_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of SGLang's processes on this machine."""
    if torch.cuda.is_available():
        return dict(environment)
    return {"OMP_NUM_THREADS": "1", **environment, "SGLANG_PLATFORM": PLATFORM_NAME}
