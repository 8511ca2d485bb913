"""The device that this process would run a model on."""

from __future__ import annotations

import torch


def device_name() -> str:
    """Name of the CUDA GPU, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
