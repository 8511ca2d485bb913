"""What one run of an evaluation requests from the server: dense decoding, or a selector's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasa_sglang.errors import FasaError
from fasa_sglang.selectors import SELECTORS

DENSE = "dense"


@dataclass(frozen=True)
class Setting:
    """One way of decoding; every sample is decoded once in each.

    Args:
        selector: One of ``SELECTORS``, or ``dense``.
        budget: Tokens attended per (request, KV head) and step; None if dense.
    """

    selector: str
    budget: int | None = None

    @property
    def name(self) -> str:
        """The setting's name in rows and tables, such as ``fasa-512``."""
        return DENSE if self.budget is None else f"{self.selector}-{self.budget}"

    @classmethod
    def from_name(cls, name: str) -> Setting:
        """The inverse of ``name``."""
        if name == DENSE:
            return cls(DENSE)
        selector, _, budget = name.rpartition("-")
        return cls(selector, int(budget))

    @property
    def order(self) -> tuple[bool, str, int]:
        """Sort key: dense first, then by selector, with rising budgets."""
        return self.budget is not None, self.selector, self.budget or 0

    def fasa(self, seed: int, request: Mapping[str, Any], choosing: bool) -> Any:
        """The request's ``fasa`` parameter.

        Args:
            seed: Seed of the ``random`` selector.
            request: Further request keys.
            choosing: Whether the server lets requests choose their selector.
        """
        if self.budget is None:
            return False
        selector = {"selector": self.selector, "seed": seed} if choosing else {}
        return {**request, "budget": self.budget, **selector}


def parse_settings(selectors: str, budgets: str) -> list[Setting]:
    """Every selector with every budget, dense first.

    Raises:
        FasaError: A selector is unknown, or a budget is not a positive integer.
    """
    names = selectors.split(",")
    for name in names:
        if name not in (*SELECTORS, DENSE):
            raise FasaError(f"unknown selector {name!r}, expected {', '.join((*SELECTORS, DENSE))}")
    try:
        sizes = [int(part) for part in budgets.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise FasaError(f"--budgets must be positive integers, got {budgets!r}")
    sparse = [Setting(name, size) for name in names if name != DENSE for size in sizes]
    return [Setting(DENSE), *sparse]


def needs_choosing(settings: Sequence[Setting]) -> bool:
    """Whether a setting needs a server that lets requests choose their selector."""
    return any(setting.selector not in (DENSE, "fasa") for setting in settings)


def json_object(text: str) -> dict[str, Any]:
    """The argparse type of an option that takes a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"invalid JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r:.80}")
    return value
