"""Tasks that send their samples one by one over SGLang's native API."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.results import Row
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.task import Options, Session, Task
from fasa_sglang.workloads.serving.client import Client

# Characters of a reply that are stored in its row.
STORED_CHARS = 500


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Args:
        name: Unique within a task.
        prompt: Token ids.
        max_new_tokens: Largest length of the reply.
        info: Columns of the row.
        data: Whatever the task needs to score a reply.
    """

    name: str
    prompt: list[int]
    max_new_tokens: int
    info: Mapping[str, Any] = field(default_factory=dict)
    data: Any = None


class SampleTask(Task):
    """A task that is a list of samples.

    All settings of a sample run one after another, so that its prompt is computed once even if the
    prefix cache cannot hold the prompts of all samples. Settings share batches, so the time of a
    single request is not meaningful.
    """

    @abstractmethod
    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """Build the samples; equal arguments give equal samples."""

    @abstractmethod
    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Decode one sample; returns its metrics and the server's reply."""

    def prepare(self, tokenizer: Any, options: Options) -> int:
        """See ``Task.prepare``."""
        self.prepared = self.samples(tokenizer, options)
        return len(self.prepared)

    def evaluate(self, settings: Sequence[Setting], session: Session) -> None:
        """See ``Task.evaluate``."""
        finished = {(row.sample, row.setting) for row in session.results.rows}
        pending = [
            (sample, [each for each in settings if (sample.name, each.name) not in finished])
            for sample in self.prepared
        ]
        pending = [(sample, missing) for sample, missing in pending if missing]
        require_room([sample for sample, _ in pending], session.context_len)
        # Enough to fill the server while some samples are at their first setting.
        max_samples = max(1, 2 * session.concurrency // len(settings))
        asyncio.run(self._evaluate(pending, max_samples, session))

    async def _evaluate(
        self, pending: Sequence[tuple[Sample, list[Setting]]], max_samples: int, session: Session
    ) -> None:
        running = asyncio.Semaphore(max_samples)
        async with Client(session.url, session.concurrency) as client:

            async def decode(sample: Sample, setting: Setting) -> None:
                metrics, reply = await self.measure(sample, setting, session, client)
                session.results.add(_row(sample, setting, metrics, reply))
                session.advance()

            async def decode_all(sample: Sample, settings: list[Setting]) -> None:
                async with running:
                    # The first setting runs alone: it fills the prefix cache, and it computes the
                    # dense reference that tasks compare the other settings with.
                    await decode(sample, settings[0])
                    async with asyncio.TaskGroup() as group:
                        for setting in settings[1:]:
                            group.create_task(decode(sample, setting))

            # The first failure ends the run; rows that were finished before are on disk.
            try:
                async with asyncio.TaskGroup() as group:
                    for sample, settings in pending:
                        group.create_task(decode_all(sample, settings))
            except BaseExceptionGroup as failures:
                first: BaseException = failures
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                raise first from None


def _row(
    sample: Sample, setting: Setting, metrics: dict[str, float], reply: Mapping[str, Any]
) -> Row:
    meta = reply["meta_info"]
    return Row(
        sample=sample.name,
        setting=setting.name,
        metrics=metrics,
        info=dict(sample.info),
        prompt_tokens=meta["prompt_tokens"],
        completion_tokens=meta["completion_tokens"],
        kv_read_ratio=(meta.get("fasa") or {}).get("kv_read_ratio"),
        text=reply.get("text", "")[:STORED_CHARS],
    )


def require_room(samples: Sequence[Sample], context_len: int) -> None:
    """Refuse samples that do not fit the server's context.

    Raises:
        FasaError: Names the first sample that does not fit.
    """
    for sample in samples:
        needed = len(sample.prompt) + sample.max_new_tokens
        if needed > context_len:
            raise FasaError(
                f"sample {sample.name} needs {len(sample.prompt)} + {sample.max_new_tokens} tokens "
                f"and the server holds {context_len}; give a smaller --length or --max-tokens"
            )


async def complete(
    sample: Sample, setting: Setting, session: Session, client: Client, **sampling: Any
) -> dict[str, Any]:
    """The reply to a sample, decoded greedily unless ``sampling`` says otherwise.

    Args:
        sample: The prompt.
        setting: How to decode.
        session: The running session.
        client: Sends the request.
        sampling: Further sampling parameters of SGLang.
    """
    return await client.generate(
        {
            "input_ids": sample.prompt,
            "sampling_params": {
                "temperature": 0,
                **sampling,
                "max_new_tokens": sample.max_new_tokens,
                "custom_params": {"fasa": session.fasa(setting)},
            },
        }
    )
