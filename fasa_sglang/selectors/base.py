"""The interface of selectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

REGISTRY: dict[str, Selector] = {}


@dataclass(frozen=True)
class DecodeView:
    """One layer's decode step of a batch, as a selector sees it.

    Args:
        q: Queries after RoPE, ``[B, HQ, D]``.
        k_cache: Keys after RoPE, one row per slot, ``[num_slots, HKV, D]``.
        slots: Position to slot, ``[B, L]``, int; entries from ``seq_lens`` on are ignored.
        seq_lens: Tokens of each request, ``[B]``, int.
        label_scores: Computes FASA's own scores from the label cache, ``[B, HKV, L]``, float32.
        head_dims: 1 at the dims of a query head's own dominant chunks, 0 elsewhere, ``[HQ, D]``,
            float32.
        sm_scale: Multiplies ``q @ k``.
        combine: How the scores of a group's query heads are combined; see
            ``reference.combine_group``.
        seeds: One seed per request, for selectors that draw at random.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    label_scores: Callable[[], torch.Tensor]
    head_dims: torch.Tensor
    sm_scale: float
    combine: str
    seeds: list[int]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.k_cache.shape[1]

    @property
    def max_len(self) -> int:
        """``L``, the columns of ``slots``."""
        return self.slots.shape[1]


class Selector(ABC):
    """A rule that ranks the cached tokens of a request for each KV head.

    Subclasses in modules of this package register themselves.

    Attributes:
        name: Value of the setting ``selector``.
        summary: One line for the documentation.
        source: Link to the method, or empty.
    """

    name: str
    summary: str
    source: str = ""

    def __init_subclass__(cls) -> None:
        REGISTRY[cls.name] = cls()

    @abstractmethod
    def scores(self, view: DecodeView) -> torch.Tensor:
        """Score every token of every request, higher is better.

        Returns:
            ``[B, HKV, L]``, float32, ``-inf`` from a request's length on. Sink and recent tokens
            are selected regardless of their scores.
        """
