"""What ``fasa eval`` measures: one module per task, or per harness with tasks of its own."""

from __future__ import annotations

import importlib
import pkgutil

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.task import HARNESSES, TASKS, HarnessTask, Task

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def task_names() -> list[str]:
    """Names of our own tasks, sorted."""
    return sorted(TASKS)


def task_classes() -> list[type[Task]]:
    """Our own tasks and the adapters of other harnesses."""
    return [*(TASKS[name] for name in task_names()), *HARNESSES]


def find_task(name: str) -> Task:
    """The task of that name: ours, or one of another harness.

    Raises:
        FasaError: There is no such task.
    """
    if name in TASKS:
        return TASKS[name]()
    missing = []
    for harness in HARNESSES:
        task: HarnessTask = harness(name)
        try:
            if task.exists():
                return task
        except ImportError as error:
            missing.append(f"{harness.harness} needs {error.name}")
    hint = f" ({'; '.join(missing)}: pip install fasa-sglang[eval])" if missing else ""
    harnesses = ", or ".join(f"a task of {harness.harness}" for harness in HARNESSES)
    raise FasaError(f"unknown task {name!r}, expected {', '.join(task_names())}, {harnesses}{hint}")
