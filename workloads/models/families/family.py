"""What is known of one model family: how to make a tiny model of it, and how FASA serves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NUM_LAYERS = 3
FALLBACK = "SGLang runs transformers' code"
IGNORED_WINDOW = "SGLang ignores the window"


def everywhere(sentence: str) -> dict[str, str]:
    """``Family.ends`` of a family that is not served on any device."""
    return {"cpu": sentence, "cuda": sentence}


@dataclass(frozen=True)
class Family:
    """One row of the table of families.

    Args:
        name: Model type of the config; with a suffix where one type has several rows.
        config: What differs from ``tiny_model.COMMON_CONFIG``.
        omitted: Keys of ``tiny_model.COMMON_CONFIG`` that this config does not have.
        selecting: The layers that select.
        ends: For a device on which a server with the tiny model ends at start, ``cpu`` or
            ``cuda``: a part of the sentence that it ends with.
        note: What a reader of the table should know, such as how SGLang differs from transformers.
        other_runs: Evidence from other models of the family, in words.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()
    selecting: tuple[int, ...] = tuple(range(NUM_LAYERS))
    ends: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    other_runs: str = ""

    @property
    def needs_gpu(self) -> bool:
        """Whether a server with the tiny model ends on a CPU alone."""
        return set(self.ends) == {"cpu"}

    @property
    def model_type(self) -> str:
        """Name of the config's type in transformers."""
        return self.name.partition(" ")[0]
