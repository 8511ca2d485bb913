"""How closely a sparse run follows the model's own dense continuation."""

from __future__ import annotations

from typing import Any

from fasa_sglang.workloads.client import Client
from fasa_sglang.workloads.forced import Step, shared_start
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
    before the first token of which the best is another than dense's.
    """

    metrics = ("top1", "kl", "followed")

    def conditions(self, options: Options) -> dict[str, Any]:
        """How the continuation is made is one of them."""
        return {**super().conditions(options), **_sampling(options)}

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
            sampling = _sampling(session.options)
            wanted = (await complete(sample, dense, session, client, **sampling))["output_ids"]
            self._references[key] = await forced(sample, wanted, dense, session, client)
        densely, theirs = self._references[key]
        wanted = [step.token_id for step in theirs]
        reply, mine = densely, theirs
        if setting != dense:
            reply, mine = await forced(sample, wanted, setting, session, client)
        followed = shared_start([step.best for step in mine], [step.best for step in theirs])
        found = compared(mine, theirs) if len(mine) > 1 else {"top1": 1.0, "kl": 0.0}
        metrics = {"top1": found["top1"], "kl": found["kl"], "followed": followed / len(mine)}
        return metrics, reply


def _sampling(options: Options) -> dict[str, Any]:
    return {"repetition_penalty": options.repetition_penalty, "ignore_eos": options.ignore_eos}
