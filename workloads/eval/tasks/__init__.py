"""What ``fasa eval`` measures: one module per kind of task, found by name."""

from __future__ import annotations

import importlib

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.tasks.base import Task

# Name: (module, class).
OWN = {
    "perplexity": ("perplexity", "Perplexity"),
    "agreement": ("agreement", "Agreement"),
    "needle": ("needle", "Needle"),
    "write-once": ("write_once", "WriteOnce"),
    "cloze": ("cloze", "Cloze"),
    "agent": ("agent_loop", "AgentLoop"),
}
# Names of other harnesses, each with its prefix left out: sgl-eval's "aime24", lm-eval's
# "niah_single_1".
HARNESSES = (("sgl_eval_task", "SglEvalTask"), ("lm_eval_task", "LmEvalTask"))


def find_task(name: str) -> Task:
    """The task of that name: ours, sgl-eval's or lm-eval's.

    Raises:
        FasaError: Nobody has it.
    """
    if name in OWN:
        module, kind = OWN[name]
        return _load(module, kind)(name)
    missing = []
    for module, kind in HARNESSES:
        task = _load(module, kind)(name)
        try:
            if task.exists():
                return task
        except ImportError as error:
            missing.append(f"{kind} needs {error.name}")
    hint = f" ({'; '.join(missing)}: pip install fasa-sglang[eval])" if missing else ""
    raise FasaError(
        f"unknown task {name!r}, expected {', '.join(OWN)}, a name of sgl-eval list, or a "
        f"generating task of lm-eval ls{hint}"
    )


def _load(module: str, kind: str) -> type[Task]:
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)
