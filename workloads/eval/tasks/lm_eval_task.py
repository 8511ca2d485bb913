"""Generating tasks of lm-eval, such as RULER and LongBench, with its data, prompts and scoring.

RULER's tasks over essays need a dataset hub and a sentence splitter. ``ruler_noise_*`` need
neither: they use the same generator and scoring over RULER's own noise text.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import version
from typing import Any, ClassVar

from fasa_sglang.calibration_cache import cache_dir
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.sample_task import Sample, SampleTask
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.task import HarnessTask, Options, Session
from fasa_sglang.workloads.publish import published
from fasa_sglang.workloads.serving.client import Client

# Numbers of needles in the noise text, as RULER has them in essays.
NOISE = {
    "ruler_noise_multikey": {"num_needle_k": 4},
    "ruler_noise_multivalue": {"num_needle_v": 4},
    "ruler_noise_multiquery": {"num_needle_q": 4},
}


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks; building it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class LmEvalTask(HarnessTask, SampleTask):
    """Metric: the first metric that lm-eval computes for the task."""

    harness = "lm-eval"
    metrics: ClassVar = {"score": "lm-eval's score"}

    def exists(self) -> bool:
        """See ``HarnessTask.exists``."""
        return self.name in NOISE or self.name in _manager().all_tasks

    def conditions(self, options: Options) -> dict[str, Any]:
        """See ``Task.conditions``."""
        return {
            "seed": options.seed,
            "harness": f"lm-eval {version('lm-eval')}",
            "length": options.length,
            "max_tokens": options.max_tokens,
            "haystack": "noise" if self.name in NOISE else "the task's own",
        }

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """One document each; its data: the document and its stop strings."""
        # The generators use Python's global random state.
        random.seed(options.seed)
        try:
            requests = (
                self._noise(tokenizer, options)
                if self.name in NOISE
                else self._requests(tokenizer, options)
            )
        except Exception as error:  # failed downloads and missing packages raise many types
            raise FasaError(
                f"lm-eval cannot build {self.name} ({type(error).__name__}: {error}); the task may "
                "need a dataset hub"
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
        """See ``SampleTask.measure``; lm-eval scores the reply."""
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
                return self._generated(tokenizer, options, partial(generator, **arguments))

            spec["custom_dataset"] = dataset
        [self.task] = _manager().load(spec)["tasks"].values()
        if self.task.OUTPUT_TYPE != "generate_until":
            raise ValueError(f"its output type is {self.task.OUTPUT_TYPE}, expected generate_until")
        self.task.build_all_requests(limit=options.limit)
        return [(*instance.args, instance.doc) for instance in self.task.instances]

    def _generated(self, tokenizer: Any, options: Options, generate: Callable[[], Any]) -> Any:
        key = {"task": self.name, **self.conditions(options)}
        return cached_dataset(key, tokenizer, options.limit, generate)

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
            for document in self._generated(tokenizer, options, generator)["test"]
        ]

    def _score(self, document: Any, text: str) -> float:
        if self.name in NOISE:
            from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

            return string_match_all(postprocess_pred([text]), [document["outputs"]])
        scores = self.task.process_results(document, [text])
        # RULER has one metric per length; those of other lengths than the document's are -1.
        return float(next(value for value in scores.values() if value != -1))


def cached_dataset(
    key: Mapping[str, Any],
    tokenizer: Any,
    limit: int,
    generate: Callable[[], Mapping[str, Any]],
) -> Any:
    """A ``datasets.DatasetDict``, generated once and cached for the user.

    RULER's generators fit every prompt to its length by tokenising it over and over, which takes
    minutes per task at 16k tokens.

    Args:
        key: Everything that the documents depend on besides the tokenizer and ``limit``.
        tokenizer: Identified by its vocabulary, so that copies of a model share their data.
        limit: Largest number of documents per split.
        generate: Returns the splits by name.
    """
    from datasets import DatasetDict, load_from_disk

    identity = [dict(key), limit, sorted(tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "data" / f"{key['task']}-{digest}"
    if not folder.is_dir():
        splits = {
            name: split.select(range(min(limit, len(split)))) for name, split in generate().items()
        }
        with published(folder) as part:
            DatasetDict(splits).save_to_disk(part)
    return load_from_disk(folder)
