"""How closely a sparse run follows the model's own dense continuation."""

from __future__ import annotations

from typing import Any

from fasa_sglang.workloads.client import Client
from fasa_sglang.workloads.forced import Step
from fasa_sglang.workloads.settings import DENSE, Setting
from fasa_sglang.workloads.tasks.base import (
    Options,
    OwnTask,
    Sample,
    Session,
    complete,
    text_pieces,
)
from fasa_sglang.workloads.tasks.perplexity import compared, forced

REPLY_TOKENS = 128


class Agreement(OwnTask):
    """The dense continuation of a text is forced, and at each step compared.

    Metrics: top-1 agreement with dense, next-token KL to it, and the share of the continuation
    that a free greedy run would have had before its first other token.
    """

    metrics = ("top1", "kl", "followed")

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """A piece of the text each."""
        tokens = options.max_tokens or REPLY_TOKENS
        self._references: dict[tuple[str, str], tuple[dict[str, Any], list[Step]]] = {}
        return [Sample(name, piece, tokens) for name, piece in text_pieces(tokenizer, options)]

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Decode densely, then force that."""
        # Each server has its own: what two of them round differently is not the setting's doing.
        key = (session.url, sample.name)
        dense = Setting(DENSE)
        if key not in self._references:
            wanted = (await complete(sample, dense, session, client))["output_ids"]
            self._references[key] = await forced(sample, wanted, dense, session, client)
        densely, theirs = self._references[key]
        wanted = [step.token_id for step in theirs]
        reply, mine = densely, theirs
        if setting != dense:
            reply, mine = await forced(sample, wanted, setting, session, client)
        followed = next((i for i, step in enumerate(mine) if step.lead < 0), len(mine))
        found = compared(mine, theirs) if len(mine) > 1 else {"top1": 1.0, "kl": 0.0}
        metrics = {"top1": found["top1"], "kl": found["kl"], "followed": followed / len(mine)}
        return metrics, reply
