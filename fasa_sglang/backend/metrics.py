"""Counters beside SGLang's own on ``/metrics``, and one log line a minute.

SGLang serves ``/metrics`` from files that all its processes write, so each event is counted in the
process where it happens: steps in the schedulers, refusals in the tokenizer process. The ranks that
schedule the same requests must count them once; ``counts_requests`` names the one that does.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

from sglang.srt.runtime_context import get_serving

logger = logging.getLogger(__name__)

LOG_SECONDS = 60.0
FLUSH_SECONDS = 1.0
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


@functools.cache
def counters() -> dict[str, Any]:
    """This process's Prometheus metrics, created on first use.

    Creating them at import would be too early: SGLang first has to choose the folder through which
    its processes share them.
    """
    from prometheus_client import Counter, Gauge, Histogram

    model = ["model_name"]
    prefix = "sglang_fasa_"
    return {
        "steps": Counter(
            f"{prefix}decode_steps", "Decode steps, counted per request.", [*model, "mode"]
        ),
        "rows_read": Counter(f"{prefix}kv_rows_read", "(token, layer) pairs attended.", model),
        "rows_saved": Counter(
            f"{prefix}kv_rows_saved",
            "(token, layer) pairs that dense decoding would have attended in addition.",
            model,
        ),
        "requests": Counter(
            f"{prefix}requests",
            "Finished requests; sparse if at least one step was sparse.",
            [*model, "mode"],
        ),
        "read_ratio": Histogram(
            f"{prefix}kv_read_ratio",
            "Share of KV rows that a finished sparse request attended.",
            model,
            buckets=RATIO_BUCKETS,
        ),
        "pruned": Counter(
            f"{prefix}pruned_tokens",
            "Generated tokens whose KV slots were freed while their request ran.",
            model,
        ),
        "live": Gauge(
            f"{prefix}live_generated_tokens",
            "Generated tokens of running requests with pruning that still have a KV slot.",
            model,
            multiprocess_mode="livesum",
        ),
        "refused": Counter(
            f"{prefix}refused_requests",
            "Requests that the checks of fasa answered with HTTP 400.",
            model,
        ),
        "label_bytes": Gauge(
            f"{prefix}label_cache_bytes",
            "Bytes of the label cache, summed over all ranks.",
            model,
            multiprocess_mode="livesum",
        ),
    }


def served_model_name() -> str:
    """The model's name as SGLang's own metrics carry it, its default filled in."""
    return str(get_serving().served_model_name)


def counts_requests(parallel: Any) -> bool:
    """Whether this rank counts the requests that it schedules.

    Tensor-parallel ranks and pipeline stages schedule the same requests, so only the first rank of
    the first stage counts them. Data-parallel ranks schedule different ones.

    Args:
        parallel: SGLang's ``ParallelContext``.
    """
    return bool(parallel.attn_tp_rank == 0 and parallel.pp_rank == 0)


def count_refusal(server_args: Any) -> None:
    """Count a request that FASA's checks refused; called in the tokenizer process."""
    if server_args.enable_metrics:
        counters()["refused"].labels(model_name=served_model_name()).inc()


class Usage:
    """Counts what the requests of one scheduler do.

    Args:
        server_args: SGLang's; without ``enable_metrics`` only the log line is written.
        label_bytes: Bytes of this rank's label cache.
        counts: Whether this rank counts steps and requests; see ``counts_requests``.
    """

    def __init__(self, server_args: Any, label_bytes: int, counts: bool) -> None:
        self._model = served_model_name()
        self._exports = server_args.enable_metrics
        self._counts = counts
        self._flushed = self._logged = time.monotonic()
        # Since the last flush and since the last log line: sparse steps, dense steps, rows read,
        # and rows that dense decoding would have read.
        self._new = [0, 0, 0, 0]
        self._minute = [0, 0, 0, 0]
        if self._exports:
            counters()["label_bytes"].labels(model_name=self._model).set(label_bytes)
        # Export the pruning metrics from the start, as zeros.
        self.add_pruned(0, 0)

    def add_step(self, sparse: bool, rows_read: int, rows_dense: int) -> None:
        """Count one step of one request.

        Args:
            sparse: Whether the step selected tokens.
            rows_read: (token, layer) pairs that the step attended.
            rows_dense: (token, layer) pairs that a dense step would have attended.
        """
        if not self._counts:
            return
        for totals in (self._new, self._minute):
            totals[0 if sparse else 1] += 1
            totals[2] += rows_read
            totals[3] += rows_dense
        now = time.monotonic()
        if now - self._flushed >= FLUSH_SECONDS:
            self._flush(now)

    def add_pruned(self, pruned: int, live: int) -> None:
        """Count what pruning did.

        Args:
            pruned: Tokens that lost their slots.
            live: Change in the number of generated tokens that have a slot and belong to a request
                with pruning.
        """
        if self._counts and self._exports:
            counters()["pruned"].labels(model_name=self._model).inc(pruned)
            counters()["live"].labels(model_name=self._model).inc(live)

    def add_request(self, sparse: bool, read_ratio: float) -> None:
        """Count a finished request, after all of its steps.

        Args:
            sparse: Whether at least one of its steps was sparse.
            read_ratio: KV rows attended / KV rows that dense decoding would have attended.
        """
        if not self._counts:
            return
        self._flush(time.monotonic())
        if self._exports:
            mode = "sparse" if sparse else "dense"
            counters()["requests"].labels(model_name=self._model, mode=mode).inc()
            if sparse:
                counters()["read_ratio"].labels(model_name=self._model).observe(read_ratio)

    def _flush(self, now: float) -> None:
        sparse, dense, read, read_densely = self._new
        self._new = [0, 0, 0, 0]
        self._flushed = now
        if self._exports:
            metrics = counters()
            metrics["steps"].labels(model_name=self._model, mode="sparse").inc(sparse)
            metrics["steps"].labels(model_name=self._model, mode="dense").inc(dense)
            metrics["rows_read"].labels(model_name=self._model).inc(read)
            metrics["rows_saved"].labels(model_name=self._model).inc(read_densely - read)
        if now - self._logged >= LOG_SECONDS:
            sparse, dense, read, read_densely = self._minute
            logger.info(
                "FASA: in the last %.0f s %d sparse and %d dense steps read %.1f %% of the KV rows",
                now - self._logged,
                sparse,
                dense,
                100 * read / max(1, read_densely),
            )
            self._minute = [0, 0, 0, 0]
            self._logged = now
