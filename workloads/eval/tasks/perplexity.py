"""Perplexity and next-token divergence on long text, decoded as a reply would be.

Most of a segment is prefilled densely. Its last tokens are forced, so that each is a decode step
over keys that earlier sparse steps wrote.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.forced_text import compare_steps, force
from fasa_sglang.workloads.eval.sample_task import Sample, SampleTask
from fasa_sglang.workloads.eval.settings import DENSE, Setting
from fasa_sglang.workloads.eval.task import Options, Session
from fasa_sglang.workloads.eval.text_prompts import text_pieces
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import Step

# Forced tokens of a segment, unless --max-tokens sets them.
FORCED_TOKENS = 128


class Perplexity(SampleTask):
    """Metrics: means over the forced tokens of segments that are spread over the text."""

    name = "perplexity"
    metrics: ClassVar = {
        "kl": "next-token KL divergence from dense decoding, nats",
        "nll": "negative log-likelihood, nats per token",
        "top1": "share of steps with dense decoding's best token",
    }

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """One segment each; the forced tokens are its data."""
        pieces = text_pieces(tokenizer, options)
        num_forced = options.max_tokens or FORCED_TOKENS
        if not 1 < num_forced < options.length:
            raise FasaError(
                f"--max-tokens must be from 2 to --length - 1 = {options.length - 1} for "
                f"perplexity, got {num_forced}"
            )
        self._references: dict[tuple[str, str], list[Step]] = {}
        info = {"length": options.length}
        return [
            Sample(name, piece[:-num_forced], num_forced, info, piece[-num_forced:])
            for name, piece in pieces
        ]

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Force the sample's data and compare with a dense run of the same tokens."""
        reply, run = await force(sample, sample.data, setting, session, client)
        # Keep one reference per server: rounding differs between servers and must not count
        # against a setting.
        key = (session.url, sample.name)
        if setting.name == DENSE:
            self._references[key] = run
        elif key not in self._references:
            dense = Setting(DENSE)
            _, self._references[key] = await force(sample, sample.data, dense, session, client)
        return compare_steps(run, self._references[key]), reply
