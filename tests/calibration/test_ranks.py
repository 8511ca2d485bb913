"""A calibration that several ranks make together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import calibrate

from fasa_sglang.dominant_fcs import DominantFCs
from serving import cores_of_two_ranks

SMALL = ("--num-fcs", "8", "--tokens", "512", "--top-k", "32", "--num-queries", "8")


@pytest.mark.thorough
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
@pytest.mark.parametrize("parallelism", ["--tp-size", "--pp-size"])
def test_two_ranks_write_the_calibration_of_one(
    parallelism: str,
    tiny_path: Path,
    tiny_calibration: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each rank ranks the chunks of its own heads or layers; the first one writes them all."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", cores_of_two_ranks(parallelism))
    calibrate(tiny_path, tmp_path / "two.fasa", *SMALL, parallelism, "2")
    one, two = DominantFCs.load(tiny_calibration), DominantFCs.load(tmp_path / "two.fasa")
    assert two.model == one.model
    assert torch.equal(two.ranking, one.ranking)
    # Sums over two ranks round differently.
    for name in ("score", "k_mean", "k_scale"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-4, atol=1e-4)
