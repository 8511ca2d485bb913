"""The backend that FASA built has to be the one that SGLang runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fasa_sglang.backend.attention.base import plan_step
from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.names import RUNNER_ATTRIBUTE


class Wrapper:
    """Stands for any of SGLang's attention backends that hold another one."""


def test_plan_step_backend_wrapped_by_sglang_is_refused() -> None:
    runner = SimpleNamespace(attn_backend=Wrapper())
    setattr(runner, RUNNER_ATTRIBUTE, object())
    with pytest.raises(UnsupportedHostError, match="SGLang runs Wrapper in place of FASA's"):
        plan_step(None, None, None, runner)


def test_plan_step_server_without_fasa_is_left_alone() -> None:
    plan_step(None, None, None, SimpleNamespace(attn_backend=Wrapper()))
