"""Generating tasks of lm-eval: RULER, LongBench and others; its data, prompts and scoring.

RULER's tasks over essays need a dataset hub and a sentence splitter. Where these cannot be had,
``ruler_noise_*`` are the same generator and scoring over RULER's own noise text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.tasks.base import Options, OwnTask, Sample, Session
from fasa_sglang.workloads.eval.tasks.kept_data import kept
from fasa_sglang.workloads.serving.client import Client

# Needles of each task over the noise text, as RULER has them over essays.
NOISE = {
    "ruler_noise_multikey": {"num_needle_k": 4},
    "ruler_noise_multivalue": {"num_needle_v": 4},
    "ruler_noise_multiquery": {"num_needle_q": 4},
}


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks; it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class LmEvalTask(OwnTask):
    """Metric: lm-eval's first metric of the task."""

    metrics = ("score",)

    def exists(self) -> bool:
        """See ``Task``."""
        return self.name in NOISE or self.name in _manager().all_tasks

    def conditions(self, options: Options) -> dict[str, Any]:
        """See ``Task``."""
        from importlib.metadata import version

        return {
            "seed": options.seed,
            "harness": f"lm-eval {version('lm-eval')}",
            "length": options.length,
            "max_tokens": options.max_tokens,
            "haystack": "noise" if self.name in NOISE else "the task's own",
        }

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """A document each."""
        # The generators draw from Python's own generator.
        random.seed(options.seed)
        try:
            requests = (
                self._noise(tokenizer, options)
                if self.name in NOISE
                else self._requests(tokenizer, options)
            )
        except Exception as error:  # downloads, missing packages and files end in many ways
            raise FasaError(
                f"lm-eval cannot make {self.name} ({type(error).__name__}: {error}); it may need a "
                "dataset hub"
            ) from error
        return [
            Sample(
                f"{i}",
                tokenizer(context).input_ids,
                options.max_tokens or until["max_gen_toks"],
                {"length": options.length},
                (document, until["until"]),
            )
            for i, (context, until, document) in enumerate(requests)
        ]

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Ask, and let lm-eval judge."""
        document, stop = sample.data
        reply = await client.generate(
            {
                "input_ids": sample.prompt,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": sample.max_new_tokens,
                    "stop": stop or None,
                    "custom_params": {"fasa": session.fasa(setting)},
                },
            }
        )
        return {"score": self._score(document, reply["text"])}, reply

    def _requests(self, tokenizer: Any, options: Options) -> list[tuple[str, Any, Any]]:
        from lm_eval.tasks._yaml_loader import load_yaml

        spec: Any = self.name
        if path := _manager().task_index[self.name].yaml_path:
            spec = load_yaml(path)
            spec["metadata"] = {
                **(spec.get("metadata") or {}),
                "tokenizer": tokenizer.name_or_path,
                "max_seq_lengths": [options.length],
            }
        if isinstance(spec, dict) and (generator := spec.get("custom_dataset")):

            def dataset(**arguments: Any) -> Any:
                return self._kept(tokenizer, options, partial(generator, **arguments))

            spec["custom_dataset"] = dataset
        [self.task] = _manager().load(spec)["tasks"].values()
        if self.task.OUTPUT_TYPE != "generate_until":
            raise ValueError(f"its output is {self.task.OUTPUT_TYPE}, not text")
        self.task.build_all_requests(limit=options.limit)
        return [(*instance.args, instance.doc) for instance in self.task.instances]

    def _kept(self, tokenizer: Any, options: Options, make: Callable[[], Any]) -> Any:
        return kept({"task": self.name, **self.conditions(options)}, tokenizer, options.limit, make)

    def _noise(self, tokenizer: Any, options: Options) -> list[tuple[str, Any, Any]]:
        from datasets import Dataset
        from lm_eval.tasks.ruler.niah_utils import TEMPLATE
        from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

        def generator() -> dict[str, Any]:
            documents = generate_samples(
                get_haystack(type_haystack="repeat"),
                max_seq_length=options.length,
                template=TEMPLATE,
                type_haystack="repeat",
                type_needle_k="words",
                type_needle_v="numbers",
                num_samples=options.limit,
                TOKENIZER=tokenizer,
                **NOISE[self.name],
            )
            return {"test": Dataset.from_list(list(documents))}

        generation = {"max_gen_toks": 128, "until": []}
        return [
            (f"{document['input']} {document['gen_prefix']}", generation, document)
            for document in self._kept(tokenizer, options, generator)["test"]
        ]

    def _score(self, document: Any, text: str) -> float:
        if self.name in NOISE:
            from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

            return string_match_all(postprocess_pred([text]), [document["outputs"]])
        judged = self.task.process_results(document, [text])
        # RULER has a metric per length, and -1 for the lengths that a document has not.
        return float(next(value for value in judged.values() if value != -1))
