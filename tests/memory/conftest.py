"""Memory mode is refused on GPUs so far."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("memory mode is served on CPUs only so far")
