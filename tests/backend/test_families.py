"""A tiny model of every family: sparse replies equal dense ones, or the server says why it ends.

The cases are the rows of ``workloads/models/families``; every server runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.workloads.bench.families.report import load_trials
from fasa_sglang.workloads.bench.families.trial import Trial
from fasa_sglang.workloads.models.families.table import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"
TRIED = load_trials(DOCS / "models", "cpu")["llama"].sglang
pytestmark = pytest.mark.skipif(
    version("sglang") != TRIED,
    reason=f"the table says what SGLang {TRIED} serves; scripts/models.sh tries another release",
)

# By transformers' code and with interleaved pairs, with experts, with windows.
SAMPLE = ("ernie4_5", "qwen3_moe", "gemma3_text")
ONLY_ON_GPUS = tuple(name for name, family in FAMILIES.items() if family.needs_gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All families with ``--all``."""
    sample = ONLY_ON_GPUS if "gpu" in metafunc.definition.keywords else SAMPLE
    if "family" in metafunc.fixturenames:
        names = tuple(FAMILIES) if metafunc.config.getoption("--all") else sample
        metafunc.parametrize("family", names)


def test_families_are_at_least_48() -> None:
    assert len(FAMILIES) >= 48


@pytest.fixture(scope="module")
def trials(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What happened to the families of the tests that run."""
    names = [
        item.callspec.params["family"]
        for item in request.session.items
        if item.path == request.path and "family" in getattr(item, "fixturenames", ())
    ]
    folder = tmp_path_factory.mktemp("families")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = ["fasa", "bench", "families", *dict.fromkeys(names), "--out", "trials"]
    # Problems are those of the tests below.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=False, timeout=1500)
    return load_trials(folder / "trials", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tried on the GPU")
def test_family_is_served_or_refused_on_a_cpu(family: str, trials: dict[str, Trial]) -> None:
    assert trials[family].problems(FAMILIES[family], "cpu") == []


@pytest.mark.gpu
def test_family_is_served_or_refused_on_a_gpu(family: str, trials: dict[str, Trial]) -> None:
    assert trials[family].problems(FAMILIES[family], "cuda") == []
