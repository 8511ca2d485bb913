"""Reasoning tasks of sgl-eval, SGLang's own harness: its data, prompts, graders and runner.

What is added is a sampler that gives every request its selector and budget, and keeps every reply.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.results import Row
from fasa_sglang.workloads.eval.settings import DENSE, Setting
from fasa_sglang.workloads.eval.tasks.base import Options, Session, Task
from fasa_sglang.workloads.serving.client import ServerEndedError
from fasa_sglang.workloads.serving.forced import shared_start


class SglEvalTask(Task):
    """Metrics: sgl-eval's score of a reply, and how much of dense's text it follows.

    The latter is the share before the first other character, where nothing is sampled.
    """

    metrics = ("score", "followed")

    def exists(self) -> bool:
        """See ``Task``."""
        from sgl_eval import registry

        return any(spec.name == self.name for spec in registry.list_evals())

    def conditions(self, options: Options) -> dict[str, Any]:
        """See ``Task``."""
        from importlib.metadata import version

        return {
            "seed": options.seed,
            "harness": f"sgl-eval {version('sgl-eval')}",
            "repeats": options.repeats,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
        }

    def prepare(self, tokenizer: Any, options: Options) -> int:
        """See ``Task``: a dry run counts the prompts."""
        counter = _Counting()
        try:
            self._run(counter, options, writer=None, threads=1)
        except (OSError, ValueError, RuntimeError) as error:
            raise FasaError(
                f"sgl-eval cannot load {self.name} ({type(error).__name__}: {error}); it needs the "
                "data's hub, or choose a task whose data it carries (aime24, aime25, aime26)"
            ) from error
        return counter.asked

    def evaluate(self, settings: Sequence[Setting], session: Session) -> None:
        """See ``Task``."""
        for setting in settings:
            self._evaluate(setting, session)

    def _evaluate(self, setting: Setting, session: Session) -> None:
        sampler = _Sampler(setting, session)

        def keep(example: Any, repeat: int, sample: Any, score: float, extracted: Any) -> None:
            if isinstance(sample.raw, _New):
                new = sample.raw
                metrics = {"score": float(score)}
                # Dense comes first.
                dense = session.results.find(new.name, DENSE)
                text = sample.text if dense is None else dense.text
                if session.options.temperature == 0 and text:
                    metrics["followed"] = shared_start(text, sample.text) / len(text)
                info = {"problem": example.id, "repeat": repeat, "finish": sample.finish_reason}
                session.results.add(
                    Row(
                        new.name,
                        setting.name,
                        metrics,
                        info,
                        sample.prompt_tokens or 0,
                        sample.completion_tokens or 0,
                        new.kv_read_ratio,
                        sample.generation_end_time - sample.generation_start_time,
                        sample.text,
                    )
                )
                session.advance()

        self._run(sampler, session.options, keep, session.concurrency)
        if sampler.failed is not None:
            raise sampler.failed

    def _run(self, sampler: Any, options: Options, writer: Any, threads: int) -> None:
        from dataclasses import replace

        from sgl_eval import registry

        spec = registry.get(self.name)
        gen = replace(
            spec.default_gen,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
        # Its progress bars would fight with ours for the terminal.
        with contextlib.redirect_stderr(io.StringIO()):
            spec.run(
                sampler=sampler,
                gen=gen,
                n_repeats=options.repeats,
                num_examples=options.limit,
                num_threads=threads,
                predictions_writer=writer,
            )


class _New:
    """What a reply of this run carries to the row."""

    def __init__(self, name: str, kv_read_ratio: float | None) -> None:
        self.name, self.kv_read_ratio = name, kv_read_ratio


class _Counting:
    """Stands in for the sampler to find out how much there is to ask."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, messages: Any, gen: Any = None) -> Any:
        from sgl_eval.types import Sample

        self.asked += 1
        return Sample(text="")


class _Sampler:
    """sgl-eval's sampler, with ``fasa`` in every request and replies that are there left out."""

    def __init__(self, setting: Setting, session: Session) -> None:
        from sgl_eval.sampler import ChatCompletionSampler

        # Its retries are for endpoints that are far away; ours either answers or is gone.
        self._ask = ChatCompletionSampler(base_url=f"{session.url}/v1", max_retries=1)
        self._setting, self._session = setting, session
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.failed: FasaError | None = None

    def __call__(self, messages: Any, gen: Any) -> Any:
        from dataclasses import replace

        from sgl_eval.runner import WorkerAborted
        from sgl_eval.types import Sample

        if self.failed is not None:
            raise WorkerAborted
        prompt = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
        with self._lock:
            # Repeats of a problem are the same prompt; which is which does not matter.
            name = f"{prompt}-{self._seen[prompt]}"
            self._seen[prompt] += 1
        row = self._session.results.find(name, self._setting.name)
        if row is not None:
            return Sample(
                text=row.text,
                completion_tokens=row.completion_tokens,
                prompt_tokens=row.prompt_tokens,
                finish_reason=row.info["finish"],
            )
        extra = {**(gen.extra_body or {}), "fasa": self._session.fasa(self._setting)}
        sample = self._ask(messages, replace(gen, extra_body=extra))
        if sample.finish_reason == "error":
            why = sample.raw
            self.failed = (
                ServerEndedError(
                    f"the server at {self._session.url} stopped answering; all samples that came "
                    "back are kept, run the command again to go on"
                )
                if why is None
                else FasaError(f"the server refused a request: {why}")
            )
            raise WorkerAborted
        metadata = getattr(sample.raw, "metadata", None) or {}
        report = next(iter(metadata.get("fasa") or []), None) or {}
        sample.raw = _New(name, report.get("kv_read_ratio"))
        return sample
