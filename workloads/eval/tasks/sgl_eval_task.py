"""Reasoning tasks of sgl-eval, SGLang's own harness, with its data, prompts, graders and runner.

We add a sampler that gives every request its selector and budget and records every reply.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, ClassVar

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.results import Row
from fasa_sglang.workloads.eval.settings import DENSE, Setting
from fasa_sglang.workloads.eval.task import HarnessTask, Options, Session, TaskOption
from fasa_sglang.workloads.serving.client import ServerEndedError
from fasa_sglang.workloads.serving.forced import shared_start


class SglEvalTask(HarnessTask):
    """Metrics: sgl-eval's score of a reply, and how much of dense decoding's text it repeats.

    The latter is the share of dense decoding's characters before the first difference; it is left
    out if replies are sampled.
    """

    harness = "sgl-eval"
    # The harness of the SGLang project itself.
    precedence = 0
    metrics: ClassVar = {
        "score": "sgl-eval's score",
        "followed": "share of dense decoding's text before the first difference",
    }
    task_options: ClassVar = (TaskOption("--samples", 1, "replies per problem"),)

    def exists(self) -> bool:
        """See ``HarnessTask.exists``."""
        from sgl_eval import registry

        return any(spec.name == self.name for spec in registry.list_evals())

    def conditions(self, options: Options) -> dict[str, Any]:
        """See ``Task.conditions``."""
        return {
            "seed": options.seed,
            "harness": f"sgl-eval {version('sgl-eval')}",
            "repeats": options.own["samples"],
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
        }

    def prepare(self, tokenizer: Any, options: Options) -> int:
        """See ``Task.prepare``: a dry run counts the prompts."""
        counter = _Counter()
        try:
            self._run(counter, options, writer=None, threads=1)
        except (OSError, ValueError, RuntimeError) as error:
            raise FasaError(
                f"sgl-eval cannot load {self.name} ({type(error).__name__}: {error}); it needs the "
                "data's hub, or choose a task whose data it ships (aime24, aime25, aime26)"
            ) from error
        return counter.prompts

    def evaluate(self, settings: Sequence[Setting], session: Session) -> None:
        """See ``Task.evaluate``."""
        for setting in settings:
            self._evaluate(setting, session)

    def _evaluate(self, setting: Setting, session: Session) -> None:
        sampler = _Sampler(setting, session)

        def record(example: Any, repeat: int, sample: Any, score: float, extracted: Any) -> None:
            if not isinstance(sample.raw, _Reply):
                return
            metrics = {"score": float(score)}
            # Dense decoding is the first setting, so its rows exist.
            dense = session.results.find(sample.raw.name, DENSE)
            text = sample.text if dense is None else dense.text
            if session.options.temperature == 0 and text:
                metrics["followed"] = shared_start(text, sample.text) / len(text)
            session.results.add(
                Row(
                    sample=sample.raw.name,
                    setting=setting.name,
                    metrics=metrics,
                    info={
                        "problem": example.id,
                        "repeat": repeat,
                        "finish": sample.finish_reason,
                    },
                    prompt_tokens=sample.prompt_tokens or 0,
                    completion_tokens=sample.completion_tokens or 0,
                    kv_read_ratio=sample.raw.kv_read_ratio,
                    seconds=sample.generation_end_time - sample.generation_start_time,
                    text=sample.text,
                )
            )
            session.advance()

        self._run(sampler, session.options, record, session.concurrency)
        if sampler.failure is not None:
            raise sampler.failure

    def _run(self, sampler: Any, options: Options, writer: Any, threads: int) -> None:
        from sgl_eval import registry

        spec = registry.get(self.name)
        gen = replace(
            spec.default_gen,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
        # Its progress bars would interfere with ours.
        with contextlib.redirect_stderr(io.StringIO()):
            spec.run(
                sampler=sampler,
                gen=gen,
                n_repeats=options.own["samples"],
                num_examples=options.limit,
                num_threads=threads,
                predictions_writer=writer,
            )


@dataclass(frozen=True)
class _Reply:
    """What a reply of this run carries to its row; replies of earlier runs have none."""

    name: str
    kv_read_ratio: float | None


class _Counter:
    """Replaces the sampler in a dry run and counts the prompts."""

    def __init__(self) -> None:
        self.prompts = 0

    def __call__(self, messages: Any, gen: Any = None) -> Any:
        from sgl_eval.types import Sample

        self.prompts += 1
        return Sample(text="")


class _Sampler:
    """sgl-eval's sampler with ``fasa`` in every request; reuses replies of earlier runs."""

    def __init__(self, setting: Setting, session: Session) -> None:
        from sgl_eval.sampler import ChatCompletionSampler

        # Its retries are meant for remote endpoints; ours either answers or has ended.
        self._sample = ChatCompletionSampler(base_url=f"{session.url}/v1", max_retries=1)
        self._setting, self._session = setting, session
        self._repeats: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.failure: FasaError | None = None

    def __call__(self, messages: Any, gen: Any) -> Any:
        from sgl_eval.runner import WorkerAborted
        from sgl_eval.types import Sample

        if self.failure is not None:
            raise WorkerAborted
        prompt = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
        with self._lock:
            # Repeats of a problem have the same prompt and are interchangeable.
            name = f"{prompt}-{self._repeats[prompt]}"
            self._repeats[prompt] += 1
        row = self._session.results.find(name, self._setting.name)
        if row is not None:
            return Sample(
                text=row.text,
                completion_tokens=row.completion_tokens,
                prompt_tokens=row.prompt_tokens,
                finish_reason=row.info["finish"],
            )
        extra = {**(gen.extra_body or {}), "fasa": self._session.fasa(self._setting)}
        sample = self._sample(messages, replace(gen, extra_body=extra))
        if sample.finish_reason == "error":
            self.failure = self._error(sample.raw)
            raise WorkerAborted
        metadata = getattr(sample.raw, "metadata", None) or {}
        report = next(iter(metadata.get("fasa") or []), None) or {}
        sample.raw = _Reply(name, report.get("kv_read_ratio"))
        return sample

    def _error(self, reason: Any) -> FasaError:
        if reason is not None:
            return FasaError(f"the server refused a request: {reason}")
        return ServerEndedError(
            f"the server at {self._session.url} stopped answering; all finished samples are saved, "
            "run the command again to continue"
        )
