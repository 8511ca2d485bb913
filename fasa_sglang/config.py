"""The server's FASA settings: one frozen dataclass and the only reader of ``FASA_CONFIG``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fasa_sglang.errors import ConfigError
from fasa_sglang.ops.label_format import LABEL_FORMATS
from fasa_sglang.ops.reference import COMBINE_RULES
from fasa_sglang.selectors import SELECTORS

ENV = "FASA_CONFIG"
CHOICES: dict[str, tuple[str, ...]] = {
    "default": ("off", "on", "auto"),
    "combine": COMBINE_RULES,
    "label_dtype": tuple(LABEL_FORMATS),
    "prune_rule": ("fasa", "random", "oldest"),
    "rope_layout": ("auto", "neox", "interleaved"),
    # With "any", every request chooses its own.
    "selector": (*SELECTORS, "any"),
}


@dataclass(frozen=True)
class FasaConfig:
    """What a server needs to know about FASA. Loaded once; passed, never looked up again.

    Args:
        calibration: The ``.safetensors`` file that ``fasa calibrate`` wrote; ``auto`` takes the one
            that ``fasa serve`` keeps for the model.
        default: Which requests without a ``fasa`` parameter use FASA: none (``off``), all
            (``on``), or those whose prompt has ``min_seq_len`` tokens or more (``auto``).
        budget: Tokens attended per (request, KV head) and step, unless the request says.
        max_budget: Largest budget a request may ask for, in tokens.
        sink: First tokens that are always attended; inside the budget.
        recent: Last tokens that are always attended, the current one first, which is attended even
            if this is 0; inside the budget.
        num_fcs: Frequency chunks read per KV head; None takes the calibration's number.
        combine: How the scores of a group's query heads become one score per KV head: ``nrm``
            sums exp(score - the head's score of the first and latest tokens), ``mean`` averages the
            raw scores, which costs one dot product for the whole group.
        num_dense_layers: Leading layers that keep full attention.
        label_dtype: Element type of the label cache: ``fp8`` (e4m3, relative to the calibration's
            mean and spread of each dim) or ``bf16``.
        rope_layout: Which head dims RoPE rotates together: ``auto`` goes by the model's type,
            ``neox`` and ``interleaved`` are for a type that is not known.
        min_seq_len: Steps of requests shorter than this many tokens stay dense.
        selector: What ranks the tokens; all but ``fasa`` are for comparison runs: the exact
            softmax weights (``oracle``), StreamingLLM, chance, Quest, FASA's own scores by pages
            of 16 tokens (``paged``), and FASA with chunks chosen for every query head instead of
            every KV head (``per_head``). With ``any`` every request chooses.
        seed: Seed of the ``random`` selector, unless the request says.
        prune_budget: Generated tokens that a pruned request keeps, unless the request says.
        prune_interval: Generated tokens too many before a request is pruned again.
        prune_recent: Last tokens that are never pruned.
        prune_grace: A token is not pruned before it has been judged by so many steps.
        prune_admission: Admit requests that prune with room for what pruning leaves of them, and
            let their replies be longer than the pool. One that loses its slots after all is aborted
            if it could not be prefilled again.
        prune_rule: Which tokens go: the least selected (``fasa``), or a null baseline.
        think_end_ids: Tokens that end a model's thinking, where no reasoning parser tells.

    Raises:
        ConfigError: A value has the wrong type or is out of its range.
    """

    calibration: str | None = None
    default: str = "off"
    budget: int = 2048
    max_budget: int = 4096
    sink: int = 4
    recent: int = 32
    num_fcs: int | None = None
    combine: str = "nrm"
    num_dense_layers: int = 1
    label_dtype: str = "fp8"
    rope_layout: str = "auto"
    min_seq_len: int = 2048
    selector: str = "fasa"
    seed: int = 0
    prune_budget: int = 4096
    prune_interval: int = 128
    prune_recent: int = 256
    prune_grace: int = 64
    prune_admission: bool = False
    prune_rule: str = "fasa"
    think_end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.calibration is not None and not isinstance(self.calibration, str):
            raise ConfigError(f"calibration must be a path, got {self.calibration!r}")
        minimums = {
            "sink": 0,
            "recent": 0,
            "num_dense_layers": 0,
            "min_seq_len": 0,
            "seed": 0,
            "num_fcs": 1,
            "budget": 1,
            "max_budget": 1,
            "prune_budget": 1,
            "prune_interval": 1,
            "prune_recent": 0,
            "prune_grace": 0,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if name == "num_fcs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        if not isinstance(self.prune_admission, bool):
            raise ConfigError(f"prune_admission must be a boolean, got {self.prune_admission!r}")
        ids = self.think_end_ids
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int for token in ids):
            raise ConfigError(f"think_end_ids must be a list of token ids, got {ids!r}")
        # JSON has no tuples.
        object.__setattr__(self, "think_end_ids", tuple(ids))
        if not self.sink + self.recent < self.budget <= self.max_budget:
            raise ConfigError(
                f"budget must be from sink + recent + 1 = {self.sink + self.recent + 1} to "
                f"max_budget = {self.max_budget} tokens, got {self.budget}"
            )

    @property
    def interleaved(self) -> bool | None:
        """The layout as ``rope_layout_from_config`` takes it."""
        return None if self.rope_layout == "auto" else self.rope_layout == "interleaved"

    @classmethod
    def load(cls, explicit: Mapping[str, Any] | None = None) -> FasaConfig:
        """Merge the settings: defaults, then ``FASA_CONFIG``, then ``explicit``.

        Args:
            explicit: The ``fasa`` object of ``--json-model-override-args``.

        Raises:
            ConfigError: The variable names no readable JSON object, or a key is unknown.
        """
        merged = {**_from_environment(), **_checked_keys(explicit, "--json-model-override-args")}
        return cls(**merged)


def _from_environment() -> dict[str, Any]:
    text = os.environ.get(ENV, "").strip()
    if not text:
        return {}
    if not text.startswith("{"):
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{ENV} must be a JSON object or the path of a readable JSON file, got {text!r} "
                f"({error})"
            ) from error
    try:
        return _checked_keys(json.loads(text), ENV)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{ENV} does not hold valid JSON ({error})") from error


def _checked_keys(values: Any, source: str) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"the fasa settings of {source} must be a JSON object, got {values!r}")
    known = [f.name for f in fields(FasaConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown setting {key!r} in {source}, expected one of {', '.join(known)}"
            )
    return dict(values)
