"""One trial: serve a family's tiny model, and compare its sparse replies with its dense ones."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.workloads.models.families.family import Family
from fasa_sglang.workloads.models.families.tiny_model import (
    FIRST_WORD,
    VOCAB_SIZE,
    write_tiny_model,
)
from fasa_sglang.workloads.models.reference_replies import greedy_replies
from fasa_sglang.workloads.serving.engine import running_engine
from fasa_sglang.workloads.serving.greedy import agreeing_steps, divergence, generate

PROMPT_LENGTHS = (40, 300, 700)
NEW_TOKENS = 24
MIN_DISTINCT, MIN_AGREEMENT = 3, 1 / 3
# Covers every prompt with its reply; the other one reads a part of the longer two.
COVERING, SMALL = {"budget": 4096}, {"budget": 40}
SETTINGS = {"min_seq_len": 0, "max_budget": 4096, "num_dense_layers": 0}
FLAGS: dict[str, Any] = {
    "max_total_tokens": 4096,
    "max_running_requests": 4,
    "cuda_graph_bs_decode": [1, 2, 4],
    # FlashInfer's kernels for linear attention take minutes to compile.
    "linear_attn_prefill_backend": "triton",
}


@dataclass(frozen=True)
class Trial:
    """What happened when a family's tiny model was served.

    Args:
        sglang: Version of SGLang.
        sentence: What the server said before it ended; empty if it served.
        refused: Whether it was FASA that ended it.
        fails_alone: Whether SGLang ends without FASA, too, with the attention backend whose dense
            steps FASA runs.
        num_layers: Layers of the model.
        selecting: Those that select.
        differences: Replies with a covering budget that are not the dense ones up to near ties, in
            words.
        same_when_covering: Steps in which these replies agree with the dense ones, before the first
            difference, by prompt.
        sparse_steps: Sparse steps of the replies with a covering budget, by prompt.
        read_when_small: Share of the tokens that replies with a small budget read, by prompt.
        same_when_small: The same as ``same_when_covering`` for replies with a small budget.
        same_in_transformers: The same for the greedy replies of transformers on a CPU; empty on a
            GPU.
        distinct: Distinct tokens of the dense replies, by prompt; if there are few, little was
            compared.
    """

    sglang: str
    sentence: str = ""
    refused: bool = False
    fails_alone: bool = False
    num_layers: int = 0
    selecting: tuple[int, ...] = ()
    differences: tuple[str, ...] = ()
    same_when_covering: tuple[int, ...] = ()
    sparse_steps: tuple[int, ...] = ()
    read_when_small: tuple[float, ...] = ()
    same_when_small: tuple[int, ...] = ()
    same_in_transformers: tuple[int, ...] = ()
    distinct: tuple[int, ...] = ()

    @property
    def summary(self) -> str:
        """One line for the terminal."""
        if self.sentence:
            return f"{'refused' if self.refused else 'SGLang ended'}: {self.sentence}"
        return (
            f"layers {self.selecting} of {self.num_layers} select, {len(self.differences)} replies "
            f"differ with a covering budget; tokens as dense with a small budget "
            f"{self.same_when_small}, in transformers {self.same_in_transformers}"
        )

    def problems(self, family: Family, device: str) -> list[str]:
        """What is not as the table of families says, in words.

        Args:
            family: The family that was tried.
            device: ``cpu`` or ``cuda``.
        """
        expected = family.ends.get(device)
        if expected is not None:
            if expected in self.sentence:
                return [] if self.refused or self.fails_alone else ["SGLang alone serves it"]
            return [f"expected that the server ends with {expected!r}, got {self.sentence!r}"]
        if self.sentence:
            return [f"the server ended: {self.sentence}"]
        problems = list(self.differences)
        # Near ties excuse single replies; a broken backend diverges within a few steps.
        if sum(self.same_when_covering) < MIN_AGREEMENT * NEW_TOKENS * len(PROMPT_LENGTHS):
            problems.append(f"only {self.same_when_covering} steps agree with a covering budget")
        if min(self.distinct) < MIN_DISTINCT:
            problems.append(f"dense replies of {self.distinct} distinct tokens compare little")
        if self.selecting != family.selecting:
            problems.append(f"layers {self.selecting} select, expected {family.selecting}")
        if self.read_when_small and self.read_when_small[-1] > 1 / 2:
            problems.append(f"a small budget reads {self.read_when_small[-1]:.0%} of the tokens")
        steps = NEW_TOKENS - 1
        if self.sparse_steps != (steps,) * len(PROMPT_LENGTHS):
            problems.append(f"{self.sparse_steps} sparse steps, expected {steps} in each reply")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; ``from_dict`` is the inverse."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Trial:
        """Convert from what ``to_dict`` returns."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in entries.items()
        }
        return cls(**values)


def serve(family: Family, folder: Path) -> Trial:
    """Serve a family's tiny model in float32 on a CPU or in bfloat16 on a GPU.

    If the server ends at start, it ends this process too.

    Args:
        family: The family.
        folder: An empty folder for the model.
    """
    _write_model(family, folder)
    calibration = cached_calibration(str(folder))
    calibration.unlink(missing_ok=True)
    try:
        replies = _replies(folder)
        shape = DominantFCs.load(calibration).model
    finally:
        calibration.unlink(missing_ok=True)
    dense, covering, small = (replies[name] for name in ("dense", "covering", "small"))
    differences = (divergence(*pair) for pair in zip(dense, covering, strict=True))
    on_gpu = torch.cuda.is_available()
    in_transformers = [] if on_gpu else greedy_replies(folder, _prompts(), NEW_TOKENS)
    return Trial(
        sglang=version("sglang"),
        num_layers=shape.num_layers,
        selecting=shape.layers,
        differences=tuple(text for text in differences if text is not None),
        same_when_covering=_agreement(dense, covering),
        sparse_steps=tuple(reply["meta_info"]["fasa"]["sparse_steps"] for reply in covering),
        read_when_small=tuple(reply["meta_info"]["fasa"]["kv_read_ratio"] for reply in small),
        same_when_small=_agreement(dense, small),
        same_in_transformers=_agreement(dense, in_transformers),
        distinct=tuple(len(set(reply["output_ids"])) for reply in dense),
    )


def serve_without_fasa(family: Family, folder: Path) -> Trial:
    """The same without FASA; what it returns says no more than that SGLang served."""
    _write_model(family, folder)
    with running_engine(folder, None, **FLAGS) as engine:
        _generate(engine, None)
    return Trial(sglang=version("sglang"))


def _write_model(family: Family, folder: Path) -> None:
    write_tiny_model(family, folder, torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def _replies(folder: Path) -> dict[str, list[dict[str, Any]]]:
    requests = {"dense": False, "covering": COVERING, "small": SMALL}
    with running_engine(folder, SETTINGS, **FLAGS) as engine:
        return {name: _generate(engine, fasa) for name, fasa in requests.items()}


def _generate(engine: Any, fasa: Any) -> list[dict[str, Any]]:
    prompts = _prompts()
    return generate(
        engine,
        prompts,
        [fasa] * len(prompts),
        NEW_TOKENS,
        return_logprob=True,
        ignore_eos=True,
    )


def _prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [
        [draw.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS
    ]


def _agreement(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> tuple[int, ...]:
    pairs = zip(expected, got, strict=False)
    return tuple(agreeing_steps(one["output_ids"], other["output_ids"]) for one, other in pairs)
