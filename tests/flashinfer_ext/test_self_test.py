"""The check of FlashInfer's undocumented behaviour at start: does it notice each difference?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("flashinfer")
from fasa_sglang.flashinfer_ext import self_test

GROUP, HEAD_DIM, DTYPE = 3, 64, torch.bfloat16


class TorchDecode:
    """What ``SelectedDecode`` computes, in torch; subclasses are wrong in one way each."""

    def __init__(
        self, indices: torch.Tensor, last_page_len: torch.Tensor, *heads_and_workspace: Any
    ) -> None:
        self.indices, self.last_page_len = indices, last_page_len

    def plan(self, lengths: tuple[int, int]) -> None:
        self.planned = lengths

    def lengths(self) -> list[int]:
        return (self.last_page_len + self.indices.shape[1] - 1).tolist()

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        sm_scale: float,
        lse: torch.Tensor,
    ) -> None:
        for row, length in enumerate(self.lengths()):
            slots = self.indices[row, :length].long()
            logits = q[row].float() @ k[slots, 0].float().T * sm_scale
            out[row] = (logits.softmax(dim=-1) @ v[slots, 0].float()).to(out.dtype)
            lse[row] = logits.logsumexp(dim=-1) / math.log(2) if length else -5e4


class IgnoresShortening(TorchDecode):
    def lengths(self) -> list[int]:
        return [max(length, 1) for length in super().lengths()]


class IgnoresDeviceLengths(TorchDecode):
    def lengths(self) -> list[int]:
        return list(self.planned)


class IgnoresNewPlans(TorchDecode):
    def plan(self, lengths: tuple[int, int]) -> None:
        self.planned = lengths if not hasattr(self, "planned") else (1, 1)

    def lengths(self) -> list[int]:
        return [min(pair) for pair in zip(super().lengths(), self.planned, strict=True)]


class KeepsFirstIndices(TorchDecode):
    def run(self, *args: Any) -> None:
        if not hasattr(self, "first"):
            self.first = self.indices.clone()
        self.indices = self.first
        super().run(*args)


class LeavesEmptyRowsUntouched(TorchDecode):
    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        *rest: Any,
    ) -> None:
        super().run(q, k, v, out, *rest)
        out[[length == 0 for length in self.lengths()]] = torch.nan


def problem(monkeypatch: pytest.MonkeyPatch, decode: type[TorchDecode]) -> str | None:
    monkeypatch.setattr(self_test, "SelectedDecode", decode)
    workspace = torch.empty(1, dtype=torch.uint8)
    return self_test.decode_problem(GROUP, HEAD_DIM, DTYPE, workspace)


def test_decode_problem_correct_decode_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem(monkeypatch, TorchDecode) is None


@pytest.mark.parametrize("decode", TorchDecode.__subclasses__(), ids=lambda cls: cls.__name__)
def test_decode_problem_wrong_decode_is_described_with_versions(
    monkeypatch: pytest.MonkeyPatch, decode: type[TorchDecode]
) -> None:
    message = problem(monkeypatch, decode)
    assert message is not None
    assert torch.__version__ in message and "decodes wrongly" in message


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 4, 7])
def test_decode_problem_installed_flashinfer_has_none(group_size: int) -> None:
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    assert self_test.decode_problem(group_size, 128, torch.bfloat16, workspace) is None
