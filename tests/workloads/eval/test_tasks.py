"""In what order the samples of a task are asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.results import Results
from fasa_sglang.workloads.eval.settings import Setting, parse_settings
from fasa_sglang.workloads.eval.tasks.base import OwnTask, Sample, Session
from fasa_sglang.workloads.serving.client import Client

SETTINGS = parse_settings("fasa,quest", "64,128")
NAMES = [str(i) for i in range(6)]


class Recording(OwnTask):
    """Needs no server and remembers what was begun and ended."""

    metrics = ("accuracy",)
    failing: tuple[str, str] | None = None

    def samples(self, tokenizer: Any, options: Any) -> list[Sample]:
        self.events: list[tuple[str, str, str]] = []
        return [Sample(name, [1, 2], 3) for name in NAMES]

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        self.events.append(("begin", sample.name, setting.name))
        await asyncio.sleep(0.001)
        if (sample.name, setting.name) == self.failing:
            raise FasaError("the server refused a request")
        self.events.append(("end", sample.name, setting.name))
        return {"accuracy": 1.0}, {"meta_info": {"prompt_tokens": 2, "completion_tokens": 3}}


def evaluate(task: Recording, folder: Path) -> list[tuple[str, str]]:
    """Run it with five requests at once; the rows there are afterwards."""
    options: Any = None
    task.prepare(None, options)
    results = Results(folder, {"task": task.name})
    session = Session("", results, None, 100, 5, options, lambda setting: None, lambda: None)
    try:
        task.evaluate(SETTINGS, session)
    finally:
        results.close()
    return [(row.sample, row.setting) for row in results.rows]


def test_a_sample_is_prefilled_once_and_few_are_held(tmp_path: Path) -> None:
    """Its first setting runs alone, the others follow while the prefix cache has the prompt."""
    task = Recording("recording")
    rows = evaluate(task, tmp_path)
    assert sorted(rows) == sorted((name, each.name) for name in NAMES for each in SETTINGS)
    for name in NAMES:
        mine = [(what, setting) for what, sample, setting in task.events if sample == name]
        assert mine[:2] == [("begin", "dense"), ("end", "dense")]
    spans = []
    for name in NAMES:
        places = [i for i, (_, sample, _) in enumerate(task.events) if sample == name]
        spans.append((places[0], places[-1]))
    # Ten requests of five settings fill a server that takes five while others are at their first.
    assert max(sum(a <= i <= b for a, b in spans) for i in range(len(task.events))) == 2


def test_what_came_back_before_a_failure_is_not_asked_for_again(tmp_path: Path) -> None:
    task = Recording("recording")
    task.failing = ("3", "quest-64")
    with pytest.raises(FasaError, match="the server refused a request"):
        evaluate(task, tmp_path)
    done = {(sample, setting) for what, sample, setting in task.events if what == "end"}
    assert len(done) > 10
    task.failing = None
    rows = evaluate(task, tmp_path)
    begun = {(sample, setting) for what, sample, setting in task.events if what == "begin"}
    assert len(rows) == len(set(rows)) == len(NAMES) * len(SETTINGS)
    assert not begun & done
