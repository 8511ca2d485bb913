"""Perplexity and next-token divergence on long text, decoded as a reply would be.

Most of a segment is prefilled densely; the last tokens are forced, so that each is a decode step
over what sparse steps before it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.settings import DENSE, Setting
from fasa_sglang.workloads.eval.tasks.base import Options, OwnTask, Sample, Session, text_pieces
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import TOP_TOKENS, Step, divergence, forced_request, steps

# Forced tokens of a segment, unless the command says.
FORCED_TOKENS = 128


class Perplexity(OwnTask):
    """Metrics: next-token KL to dense, negative log-likelihood, top-1 agreement; means of steps.

    Segments are spread over the text.
    """

    metrics = ("kl", "nll", "top1")

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """One segment each; the forced tokens are its data."""
        pieces = text_pieces(tokenizer, options)
        count_forced = options.max_tokens or FORCED_TOKENS
        if not 1 < count_forced < options.length:
            raise FasaError(
                f"--max-tokens must be from 2 to --length - 1 = {options.length - 1} for "
                f"perplexity, got {count_forced}"
            )
        self._references: dict[tuple[str, str], list[Step]] = {}
        info = {"length": options.length}
        return [
            Sample(name, piece[:-count_forced], count_forced, info, piece[-count_forced:])
            for name, piece in pieces
        ]

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Force the sample's data; compare with the dense run of the same."""
        reply, made = await forced(sample, sample.data, setting, session, client)
        # Each server has its own: what two of them round differently is not the setting's doing.
        key = (session.url, sample.name)
        if setting.name == DENSE:
            self._references[key] = made
        elif key not in self._references:
            _, self._references[key] = await forced(
                sample, sample.data, Setting(DENSE), session, client
            )
        return compared(made, self._references[key]), reply


async def forced(
    sample: Sample, wanted: Sequence[int], setting: Setting, session: Session, client: Client
) -> tuple[dict[str, Any], list[Step]]:
    """The reply to a sample that had to be ``wanted``, and what the model held of each token."""
    custom_params = {"fasa": session.fasa(setting)}
    body = forced_request(wanted, custom_params, top_tokens=TOP_TOKENS)
    reply = await client.generate({"input_ids": sample.prompt, **body})
    return reply, steps(reply, wanted)


def compared(
    made: Sequence[Step],
    reference: Sequence[Step],
    divergence: Callable[[Step, Step], float] = divergence,
) -> dict[str, float]:
    """Means over the decode steps; the first step is the prefill's, which is dense in all."""
    pairs = list(zip(made[1:], reference[1:], strict=True))
    return {
        "kl": sum(divergence(theirs, mine) for mine, theirs in pairs) / len(pairs),
        "nll": -sum(mine.logprob for mine, _ in pairs) / len(pairs),
        "top1": sum(mine.best == theirs.best for mine, theirs in pairs) / len(pairs),
    }
