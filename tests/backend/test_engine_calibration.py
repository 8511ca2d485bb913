"""The engine's own calibration, as far as it needs no engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fasa_sglang.backend.engine_calibration import _memory_errors_explained
from fasa_sglang.errors import CalibrationError


def test_out_of_memory_is_one_sentence_with_the_way_out() -> None:
    runner = SimpleNamespace(model_config=SimpleNamespace(model_path="big"))
    with pytest.raises(CalibrationError) as caught, _memory_errors_explained(runner):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmore")
    message = str(caught.value)
    assert "memory does not suffice to calibrate big" in message
    assert "smaller --chunked-prefill-size" in message and "\n" not in message
