"""What every task is given and has to do."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fasa_sglang.calibration.corpus import Text
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.results import Results, Row
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.serving.client import Client

TEXT_KEPT = 500


@dataclass(frozen=True)
class Options:
    """What the command line says about all tasks.

    Args:
        limit: Most samples, problems or documents.
        repeats: Replies per problem, where a task samples.
        length: Tokens of a prompt, where a task makes its prompts.
        max_tokens: Most tokens of a reply; None leaves it to the task.
        seed: Of prompts and of the ``random`` selector.
        temperature: Of tasks that sample, and of the continuations that ``agreement`` forces.
        repetition_penalty: Of these continuations.
        ignore_eos: These do without the model's end of a turn.
        text: Of prompts that are made from text.
    """

    limit: int
    repeats: int
    length: int
    max_tokens: int | None
    seed: int
    temperature: float
    repetition_penalty: float
    ignore_eos: bool
    text: Text


@dataclass
class Session:
    """A server and a results folder, for the time of one task.

    Args:
        url: The server that decodes ``setting`` and, if a task needs it, densely.
        results: Where rows go.
        tokenizer: The model's.
        context_len: Most tokens of a request.
        concurrency: Most requests at once.
        options: See ``Options``.
        fasa: What a request of a setting carries as ``fasa``.
        advance: Called after every row.
    """

    url: str
    results: Results
    tokenizer: Any
    context_len: int
    concurrency: int
    options: Options
    fasa: Callable[[Setting], Any]
    advance: Callable[[], None]


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Args:
        name: Unique within a task.
        prompt: Token ids.
        max_new_tokens: Of the reply.
        info: Columns of the row.
        data: What the task needs to judge a reply.
    """

    name: str
    prompt: list[int]
    max_new_tokens: int
    info: Mapping[str, Any] = field(default_factory=dict)
    data: Any = None


class Task(ABC):
    """One task of ``fasa eval``.

    Args:
        name: As the command line calls it.

    Attributes:
        metrics: What its rows hold, the most telling one first.
    """

    metrics: tuple[str, ...]

    def __init__(self, name: str) -> None:
        self.name = name

    def exists(self) -> bool:
        """Whether there is such a task."""
        return True

    def conditions(self, options: Options) -> dict[str, Any]:
        """What the rows depend on beside model and server."""
        return {
            "seed": options.seed,
            "length": options.length,
            "max_tokens": options.max_tokens,
            "text": options.text.sha256[:12],
        }

    @abstractmethod
    def prepare(self, tokenizer: Any, options: Options) -> int:
        """Make or load the samples; returns how many rows a setting will have.

        Raises:
            FasaError: The data cannot be had.
        """

    @abstractmethod
    def evaluate(self, settings: Sequence[Setting], session: Session) -> None:
        """Decode and judge all samples in all settings, where their rows are missing.

        Raises:
            FasaError: The server refused or ended.
        """


class OwnTask(Task):
    """A task whose samples are asked for one by one over SGLang's native API.

    All settings of a sample follow each other, so that its prompt is computed once even where the
    prefix cache does not hold all of them. They share batches: how long one took says nothing.
    """

    @abstractmethod
    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """Make the samples; equal arguments give equal ones."""

    @abstractmethod
    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Decode one sample; returns its metrics and the server's reply."""

    def prepare(self, tokenizer: Any, options: Options) -> int:
        """See ``Task``."""
        self.prepared = self.samples(tokenizer, options)
        return len(self.prepared)

    def evaluate(self, settings: Sequence[Setting], session: Session) -> None:
        """See ``Task``."""
        there = {(row.sample, row.setting) for row in session.results.rows}
        missing = [
            (sample, [setting for setting in settings if (sample.name, setting.name) not in there])
            for sample in self.prepared
        ]
        missing = [(sample, wanted) for sample, wanted in missing if wanted]
        require_room([sample for sample, _ in missing], session.context_len)
        # Enough to fill the server while some are at their first setting.
        at_once = max(1, 2 * session.concurrency // len(settings))
        asyncio.run(self._evaluate(missing, at_once, session))

    async def _evaluate(
        self, missing: Sequence[tuple[Sample, list[Setting]]], at_once: int, session: Session
    ) -> None:
        begun = asyncio.Semaphore(at_once)
        async with Client(session.url, session.concurrency) as client:

            async def one(sample: Sample, setting: Setting) -> None:
                metrics, reply = await self.measure(sample, setting, session, client)
                meta = reply["meta_info"]
                report = meta.get("fasa") or {}
                session.results.add(
                    Row(
                        sample.name,
                        setting.name,
                        metrics,
                        dict(sample.info),
                        meta["prompt_tokens"],
                        meta["completion_tokens"],
                        report.get("kv_read_ratio"),
                        text=reply.get("text", "")[:TEXT_KEPT],
                    )
                )
                session.advance()

            async def all_of(sample: Sample, wanted: list[Setting]) -> None:
                async with begun:
                    # Alone: it fills the prefix cache for the others, and where they are
                    # compared with a dense run, it makes that.
                    await one(sample, wanted[0])
                    async with asyncio.TaskGroup() as group:
                        for setting in wanted[1:]:
                            group.create_task(one(sample, setting))

            # The first failure ends the run; what came back before is kept.
            try:
                async with asyncio.TaskGroup() as group:
                    for sample, wanted in missing:
                        group.create_task(all_of(sample, wanted))
            except BaseExceptionGroup as failed:
                first: BaseException = failed
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                raise first from None


def require_room(samples: Sequence[Sample], context_len: int) -> None:
    """Refuse samples that the server cannot hold.

    Raises:
        FasaError: Names the longest.
    """
    for sample in samples:
        needed = len(sample.prompt) + sample.max_new_tokens
        if needed > context_len:
            raise FasaError(
                f"sample {sample.name} needs {len(sample.prompt)} + {sample.max_new_tokens} tokens "
                f"and the server holds {context_len}; give a smaller --length or --max-tokens"
            )


async def complete(
    sample: Sample,
    setting: Setting,
    session: Session,
    client: Client,
    **sampling: Any,
) -> dict[str, Any]:
    """The reply to a sample, greedy unless ``sampling``, more of SGLang's parameters, says."""
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


def chat_ids(tokenizer: Any, content: str) -> list[int]:
    """One user's turn as the model wants it, up to where its answer begins."""
    if tokenizer.chat_template is None:
        return tokenizer(f"{content}\n").input_ids
    turns = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def text_ids(tokenizer: Any, text: Text, least: int) -> list[int]:
    """The text's tokens.

    Raises:
        FasaError: There are fewer than ``least``.
    """
    ids = tokenizer(text.content, add_special_tokens=False).input_ids
    if len(ids) < least:
        raise FasaError(
            f"the text {text.name} has {len(ids)} tokens and {least} are needed; give a longer one "
            "with --text, or a smaller --length or --limit"
        )
    return ids


def text_pieces(tokenizer: Any, options: Options) -> list[tuple[str, list[int]]]:
    """Pieces of the text, ``options.length`` tokens each, spread over it, with their names.

    They overlap where the text is too short for all.

    Raises:
        FasaError: The text is shorter than one.
    """
    ids = text_ids(tokenizer, options.text, options.length + 1)
    room = len(ids) - options.length
    count = min(options.limit, room)
    starts = [i * room // count for i in range(count)]
    return [(f"at-{start}", ids[start : start + options.length]) for start in starts]
