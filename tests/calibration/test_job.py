"""What ``fasa calibrate`` tells the engine through the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasa_sglang.calibration.corpus import Text, default_text
from fasa_sglang.calibration.job import ENV, CalibrationJob
from fasa_sglang.calibration.settings import CalibrationSettings

SETTINGS = CalibrationSettings("agreement", num_fcs=3, tokens=64, top_k=8, num_queries=2, seed=7)
JOBS = {
    "all": CalibrationJob(Text("ä.txt", "Grüße,\n\n世界\r\n" * 9), "/tmp/ä b.fasa", SETTINGS),
    "defaults": CalibrationJob(),
    "long": CalibrationJob(Text("long", "x" * 3_000_000)),
}


@pytest.mark.parametrize("name", JOBS)
def test_job_from_its_environment_is_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that is longer than an environment variable can be travels in a file."""
    job = JOBS[name]
    environment = job.environment(tmp_path / "text")
    assert list(environment) == [ENV] and len(environment[ENV]) < 1000
    monkeypatch.setenv(ENV, environment[ENV])
    got = CalibrationJob.from_environment()
    assert got == job
    assert got.text.sha256 == job.text.sha256


def test_job_without_its_variable_is_that_of_an_ordinary_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(ENV, raising=False)
    assert CalibrationJob.from_environment() is None
    assert CalibrationJob().text == default_text()
