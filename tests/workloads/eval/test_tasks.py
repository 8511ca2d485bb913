"""The registry of tasks, their modules, and the order in which samples are decoded."""

from __future__ import annotations

import argparse
import ast
import asyncio
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fasa_sglang.calibration.corpus import default_text
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval import command, tasks
from fasa_sglang.workloads.eval.results import Results
from fasa_sglang.workloads.eval.sample_task import Sample, SampleTask
from fasa_sglang.workloads.eval.settings import Setting, parse_settings
from fasa_sglang.workloads.eval.task import Options, Session, TaskOption
from fasa_sglang.workloads.eval.tasks import find_task, task_classes
from fasa_sglang.workloads.serving.client import Client

SETTINGS = parse_settings("fasa,quest", "64,128")
NAMES = [str(i) for i in range(6)]
OPTIONS = Options(limit=len(NAMES), length=10, seed=0, text=default_text())


class Recording(SampleTask):
    """Needs no server and records when measurements begin and end."""

    name = "recording"
    metrics: ClassVar = {"accuracy": "share of right answers"}
    task_options: ClassVar = (
        TaskOption("--recording-speed", 1.5, "how fast it plays"),
        TaskOption("--recording-loud", False, "play loudly"),
    )
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
    """Run the task with five requests in flight; returns its rows."""
    task.prepare(None, OPTIONS)
    results = Results(folder, {"task": task.name})
    session = Session("", results, None, 100, 5, OPTIONS, lambda setting: None, lambda: None)
    try:
        task.evaluate(SETTINGS, session)
    finally:
        results.close()
    return [(row.sample, row.setting) for row in results.rows]


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser()
    command.add_arguments(own)
    return own


def test_task_that_defines_a_name_is_found_and_in_the_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing but the class has to be added for a task and its options."""
    assert isinstance(find_task("recording"), Recording)
    monkeypatch.setenv("COLUMNS", "1000")
    help_text = " ".join(parser().format_help().split())
    own, _, others = help_text.partition(", or a task of sgl-eval or lm-eval")
    assert "recording" in own.split("TASK")[-1] and others
    assert "--recording-loud play loudly" in help_text
    args = parser().parse_args(["recording", "--recording-loud"])
    assert (args.recording_speed, args.recording_loud) == (1.5, True)


def test_every_module_of_the_package_has_a_task() -> None:
    modules = {path.stem for path in Path(tasks.__path__[0]).glob("*.py")} - {"__init__"}
    assert modules == {cls.__module__.split(".")[-1] for cls in task_classes()} - {__name__}
    assert all(cls.metrics for cls in task_classes())


def test_task_modules_import_neither_each_other_nor_a_benchmark() -> None:
    for path in Path(tasks.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path.stem != "__init__":
                module = node.module or ""
                assert ".eval.tasks" not in module and ".bench" not in module, (path, module)


def test_evaluate_prefills_each_sample_once(tmp_path: Path) -> None:
    """Its first setting runs alone; the others follow while the prefix cache has the prompt."""
    task = Recording()
    rows = evaluate(task, tmp_path)
    assert sorted(rows) == sorted((name, each.name) for name in NAMES for each in SETTINGS)
    for name in NAMES:
        own = [(what, setting) for what, sample, setting in task.events if sample == name]
        assert own[:2] == [("begin", "dense"), ("end", "dense")]
    spans = []
    for name in NAMES:
        indices = [i for i, (_, sample, _) in enumerate(task.events) if sample == name]
        spans.append((indices[0], indices[-1]))
    # Ten requests of five settings fill a server that takes five while others are at their first.
    assert max(sum(a <= i <= b for a, b in spans) for i in range(len(task.events))) == 2


def test_evaluate_after_a_failure_decodes_only_what_is_missing(tmp_path: Path) -> None:
    task = Recording()
    task.failing = ("3", "quest-64")
    with pytest.raises(FasaError, match="the server refused a request"):
        evaluate(task, tmp_path)
    finished = {(sample, setting) for what, sample, setting in task.events if what == "end"}
    assert len(finished) > 10
    task.failing = None
    rows = evaluate(task, tmp_path)
    begun = {(sample, setting) for what, sample, setting in task.events if what == "begin"}
    assert len(rows) == len(set(rows)) == len(NAMES) * len(SETTINGS)
    assert not begun & finished
