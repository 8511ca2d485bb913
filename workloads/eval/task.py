"""The base classes of evaluation tasks, and their registries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fasa_sglang.calibration.corpus import Text
from fasa_sglang.workloads.eval.results import Results
from fasa_sglang.workloads.eval.settings import Setting

TASKS: dict[str, type[Task]] = {}
"""Our own tasks by name."""
HARNESSES: list[type[HarnessTask]] = []
"""Adapters of other evaluation harnesses, by precedence."""


@dataclass(frozen=True)
class TaskOption:
    """A command-line option that only one task has.

    Args:
        flag: The option, such as ``--ignore-eos``.
        default: Its default, which also determines its type; False makes it a switch.
        help: Its help text.
    """

    flag: str
    default: Any
    help: str

    @property
    def name(self) -> str:
        """Key of the value in ``Options.own``."""
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line's options for tasks.

    Args:
        limit: Largest number of samples, problems or documents.
        length: Prompt length in tokens, for tasks that build their prompts.
        seed: Seed of prompts and of the ``random`` selector.
        text: Text that prompts are built from.
        max_tokens: Largest reply length in tokens; None leaves it to the task.
        temperature: Sampling temperature, for tasks that sample.
        own: Values of the options that tasks declare themselves, by ``TaskOption.name``.
    """

    limit: int
    length: int
    seed: int
    text: Text
    max_tokens: int | None = None
    temperature: float = 0.0
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Session:
    """A server and a results folder, for the duration of one task.

    Args:
        url: The server's address.
        results: Receives the rows.
        tokenizer: The model's tokenizer.
        context_len: Largest number of tokens of a request.
        concurrency: Largest number of requests in flight.
        options: The command line's options.
        fasa: Returns the ``fasa`` parameter of a setting's requests.
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


class Task(ABC):
    """One task of ``fasa eval``.

    A subclass in a module of ``eval.tasks`` that defines ``name`` is a task of the command line;
    nothing else has to be registered.

    Attributes:
        name: Name on the command line.
        metrics: Readable names of the metrics by their keys in rows, the most telling one first.
        task_options: Command-line options of this task alone.
        distances: Further metrics, which are drawn against look-back distance: their keys in rows,
            and the least distance in tokens that each counts.
    """

    name: str
    metrics: ClassVar[Mapping[str, str]]
    distances: ClassVar[Mapping[str, int]] = {}
    task_options: ClassVar[Sequence[TaskOption]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            TASKS[cls.name] = cls

    def conditions(self, options: Options) -> dict[str, Any]:
        """Everything that the rows depend on besides the model and the server, as JSON values."""
        return {
            "seed": options.seed,
            "length": options.length,
            "max_tokens": options.max_tokens,
            "text": options.text.sha256[:12],
        }

    @abstractmethod
    def prepare(self, tokenizer: Any, options: Options) -> int:
        """Build or load the samples.

        Returns:
            The number of rows of each setting.

        Raises:
            FasaError: The data is not available.
        """

    @abstractmethod
    def evaluate(self, settings: Sequence[Setting], session: Session) -> None:
        """Decode and score all samples whose rows are missing, in all settings.

        Raises:
            FasaError: The server refused a request or ended.
        """


class HarnessTask(Task):
    """A task of another evaluation harness; one class adapts all tasks of a harness.

    Args:
        name: The harness's name of the task.

    Attributes:
        harness: Name of the harness; a subclass that defines it is registered.
        precedence: If several harnesses have a task of the same name, the lowest number wins.
    """

    harness: ClassVar[str]
    precedence: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "harness" in vars(cls):
            HARNESSES.append(cls)
            HARNESSES.sort(key=lambda harness: harness.precedence)

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def exists(self) -> bool:
        """Whether the harness has a task of this name.

        Raises:
            ImportError: The harness is not installed.
        """
