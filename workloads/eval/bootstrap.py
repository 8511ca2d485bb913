"""Confidence intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 2000


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of a mean; equal values give equal intervals."""
    if len(values) < 2 or max(values) == min(values):
        return (float(np.mean(values)),) * 2
    return _interval(np.mean, values)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float]
) -> tuple[float, float]:
    """95 % confidence interval of a ratio of sums; samples are resampled in pairs."""
    if list(numerators) == list(denominators):
        return 1.0, 1.0

    def ratio(numerator: Any, denominator: Any, axis: int = -1) -> Any:
        return numerator.sum(axis=axis) / denominator.sum(axis=axis)

    return _interval(ratio, numerators, denominators)


def _interval(statistic: Callable[..., Any], *samples: Sequence[float]) -> tuple[float, float]:
    interval = bootstrap(
        tuple(np.asarray(values, dtype=float) for values in samples),
        statistic,
        paired=len(samples) > 1,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
