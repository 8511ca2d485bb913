"""Time the requests of ``fasa bench serve`` on one engine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from fasa_sglang.workloads.serving.engine import flush_cache

REPEATS = 3
# Prefills of more tokens than this are timed once: they vary little and take most of the time.
SHORT_PREFILL = 65536
SHORT_PROMPT = 2048
# Differences of one percent matter for short prompts.
SHORT_PROMPT_REPEATS = 9


@dataclass
class Row:
    """One batch shape on one engine. Times in milliseconds.

    Args:
        batch_size: Requests that decode together.
        context_len: Tokens of prompt and reply.
        engine: Label of the baseline, or ``fasa``.
        fasa: Whether the requests use FASA.
        ttft_ms: Time to the first token of all cold prompts.
        tpot_ms: Time per output token.
        tokens_per_s: Output tokens per second of the whole batch.
        kv_read_ratio: KV rows attended over those of dense decoding; None without FASA.
        speedups: Time per output token of every baseline over that of this row, by label.
    """

    batch_size: int
    context_len: int
    engine: str
    fasa: bool
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    kv_read_ratio: float | None
    speedups: dict[str, float] = field(default_factory=dict)

    @property
    def case(self) -> tuple[int, int]:
        """The batch shape."""
        return self.batch_size, self.context_len


def time_engine(
    engine: Any,
    label: str,
    cases: Sequence[tuple[int, int]],
    parameters: Sequence[Any],
    output_tokens: int,
    log: Console,
) -> list[Row]:
    """Time all batch shapes on one engine.

    Args:
        engine: The engine.
        label: Its label in the rows.
        cases: (batch size, context length in tokens).
        parameters: Values of ``fasa`` in the requests, each timed in turn; None leaves it out.
        output_tokens: Tokens that are timed per request.
        log: Receives the progress.
    """
    rows = []
    for batch_size, context_len in cases:
        rng = random.Random(0)
        prompts = [
            [rng.randrange(1000, 40000) for _ in range(context_len - output_tokens)]
            for _ in range(batch_size)
        ]
        ttft_ms = _ttft(engine, prompts, parameters[0])
        for fasa in parameters:
            tpot_ms, ratio = _tpot(engine, prompts, fasa, output_tokens)
            row = Row(
                batch_size,
                context_len,
                label,
                bool(fasa),
                ttft_ms,
                tpot_ms,
                batch_size * 1e3 / tpot_ms,
                ratio,
            )
            log.print(f"  {batch_size} x {context_len}, fasa {fasa}: {tpot_ms:.2f} ms per token")
            rows.append(row)
    return rows


def add_speedups(rows: Sequence[Row], baselines: Sequence[str]) -> None:
    """Fill in ``speedups`` of all rows, which must include every baseline's."""
    for label in baselines:
        tpot_ms = {row.case: row.tpot_ms for row in rows if row.engine == label}
        for row in rows:
            row.speedups[label] = tpot_ms[row.case] / row.tpot_ms


def _ttft(engine: Any, prompts: list[list[int]], fasa: Any) -> float:
    """Median time to the first token of all cold prompts; leaves them in the prefix cache."""
    times = []
    repeats = _repeats(prompts) if len(prompts) * len(prompts[0]) <= SHORT_PREFILL else 1
    for _ in range(repeats):
        flush_cache(engine)
        times.append(_generate(engine, prompts, fasa, 1)[0])
    return statistics.median(times) * 1e3


def _repeats(prompts: list[list[int]]) -> int:
    return SHORT_PROMPT_REPEATS if len(prompts[0]) <= SHORT_PROMPT else REPEATS


def _tpot(
    engine: Any, prompts: list[list[int]], fasa: Any, output_tokens: int
) -> tuple[float, float | None]:
    first, whole = [], []
    for _ in range(_repeats(prompts)):
        first.append(_generate(engine, prompts, fasa, 1)[0])
        seconds, replies = _generate(engine, prompts, fasa, output_tokens)
        whole.append(seconds)
    tpot_ms = (statistics.median(whole) - statistics.median(first)) / (output_tokens - 1) * 1e3
    report = replies[0]["meta_info"].get("fasa")
    return tpot_ms, None if report is None else report["kv_read_ratio"]


def _generate(
    engine: Any, prompts: list[list[int]], fasa: Any, max_new_tokens: int
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds that all replies took, and the replies."""
    params: dict[str, Any] = {
        "temperature": 0,
        "max_new_tokens": max_new_tokens,
        "ignore_eos": True,
    }
    if fasa is not None:
        params["custom_params"] = {"fasa": fasa}
    start = time.perf_counter()
    replies = engine.generate(input_ids=prompts, sampling_params=params)
    return time.perf_counter() - start, replies
