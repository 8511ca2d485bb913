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
OVERRIDES_FLAG = "--json-model-override-args"
"""SGLang's flag whose ``fasa`` object holds the settings."""

CHOICES: dict[str, tuple[str, ...]] = {
    "default": ("off", "on", "auto"),
    "combine": COMBINE_RULES,
    "label_dtype": tuple(LABEL_FORMATS),
    "prune_rule": ("fasa", "random", "oldest"),
    # "any" lets each request choose its selector.
    "selector": (*SELECTORS, "any"),
}
MINIMUMS = {
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


@dataclass(frozen=True)
class FasaConfig:
    """The FASA settings of a server. Loaded once per process and passed on from there.

    Args:
        calibration: Path of the file that ``fasa calibrate`` wrote, or ``auto``: the server
            calibrates itself at its first start and keeps the result in its cache.
        default: What to do with requests that do not set ``fasa``: decode densely (``off``), use
            FASA (``on``), or use FASA if the prompt has at least ``min_seq_len`` tokens (``auto``).
        budget: Default number of tokens attended per (request, KV head) and step.
        max_budget: Largest budget that a request may set, in tokens.
        sink: Number of first tokens that are always attended; part of the budget.
        recent: Number of last tokens that are always attended; part of the budget. The current
            token is attended even if this is 0.
        num_fcs: Frequency chunks read per KV head; None takes the calibration's number.
        combine: How the scores of a group's query heads become one score per KV head. ``nrm`` sums
            exp(score - anchor), where a head's anchor is its best score among the first and latest
            tokens. ``mean`` averages the raw scores, which takes one dot product per group.
        num_dense_layers: Number of leading layers that always attend to all tokens.
        label_dtype: Element type of the label cache, a key of ``LABEL_FORMATS``.
        min_seq_len: A request decodes densely while it is shorter than this many tokens.
        selector: The rule that ranks tokens, a key of ``SELECTORS``; all but ``fasa`` are for
            comparison. With ``any`` each request chooses its own.
        seed: Default seed of the ``random`` selector.
        prune_budget: Default number of generated tokens that a pruned request keeps.
        prune_interval: How far a request may exceed ``prune_budget`` before it is pruned again, in
            tokens.
        prune_recent: Number of last tokens that are never pruned.
        prune_grace: Minimum number of sparse steps that must have scored a token before it may be
            pruned.
        prune_admission: Admit a request that prunes by the memory it needs after pruning, and allow
            its reply to be longer than the pool. If such a request is retracted and no longer
            fits, it is aborted (HTTP 503).
        prune_rule: Which tokens are pruned: the least selected (``fasa``), or those of a null
            baseline.
        think_end_ids: Token ids that end the model's thinking, for servers without a reasoning
            parser.

    Raises:
        ConfigError: A value has the wrong type or is out of its range.
    """

    calibration: str = "auto"
    default: str = "off"
    budget: int = 2048
    max_budget: int = 4096
    sink: int = 4
    recent: int = 32
    num_fcs: int | None = None
    combine: str = "nrm"
    num_dense_layers: int = 1
    label_dtype: str = "fp8"
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
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r:.80}")
        path = self.calibration
        if not isinstance(path, str) or not path:
            raise ConfigError(
                f"calibration must be 'auto' or the path of a file, got {path!r:.80}; run fasa "
                "calibrate to write one"
            )
        for name, minimum in MINIMUMS.items():
            value = getattr(self, name)
            if name == "num_fcs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(
                    f"{name} must be an integer of at least {minimum}, got {value!r:.80}"
                )
        if not isinstance(self.prune_admission, bool):
            raise ConfigError(
                f"prune_admission must be a boolean, got {self.prune_admission!r:.80}"
            )
        ids = self.think_end_ids
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int for token in ids):
            raise ConfigError(f"think_end_ids must be a list of token ids, got {ids!r:.80}")
        # JSON has lists only.
        object.__setattr__(self, "think_end_ids", tuple(ids))
        if not self.sink + self.recent < self.budget <= self.max_budget:
            raise ConfigError(
                f"budget must be from sink + recent + 1 = {self.sink + self.recent + 1} to "
                f"max_budget = {self.max_budget} tokens, got {self.budget}"
            )

    @classmethod
    def load(cls, explicit: Mapping[str, Any] | None = None) -> FasaConfig:
        """Merge the settings; ``explicit`` overrides ``FASA_CONFIG``, which overrides the defaults.

        Args:
            explicit: The ``fasa`` object of ``--json-model-override-args``.

        Raises:
            ConfigError: The variable does not hold a readable JSON object, a key is unknown, or a
                value is out of its range.
        """
        return cls(**{**environment_settings(), **check_keys(explicit, OVERRIDES_FLAG)})


def environment_settings() -> dict[str, Any]:
    """The settings in ``FASA_CONFIG``, which holds a JSON object or the path of a JSON file.

    Raises:
        ConfigError: The file cannot be read, the JSON is invalid, or a key is unknown.
    """
    text = os.environ.get(ENV, "").strip()
    if not text:
        return {}
    if not text.startswith("{"):
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(
                f"{ENV} must be a JSON object or the path of a readable JSON file, got "
                f"{text!r:.80} ({reason})"
            ) from error
    return check_keys(json_object(text, ENV), ENV)


def json_object(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The JSON.
        source: The flag or variable that holds it, for the message.

    Raises:
        ConfigError: The text is not valid JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{source} does not hold valid JSON ({error}), got {text!r:.80}"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source} must be a JSON object, got {text!r:.80}")
    return value


def check_keys(values: Any, source: str) -> dict[str, Any]:
    """Refuse settings that do not exist.

    Args:
        values: The settings, or None for no settings.
        source: The flag or variable that holds them, for the message.

    Raises:
        ConfigError: ``values`` is not a mapping, or has an unknown key.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"the fasa settings in {source} must be a JSON object, got {values!r:.80}"
        )
    known = [f.name for f in fields(FasaConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown setting {key!r:.80} in {source}, expected one of {', '.join(known)}"
            )
    return dict(values)
