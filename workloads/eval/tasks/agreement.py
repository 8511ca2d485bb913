"""How closely a sparse run follows the model's own dense continuation."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from typing import Any

from fasa_sglang.calibration_cache import cache_dir
from fasa_sglang.workloads.eval.settings import DENSE, Setting
from fasa_sglang.workloads.eval.tasks.base import (
    Options,
    OwnTask,
    Sample,
    Session,
    complete,
    text_pieces,
)
from fasa_sglang.workloads.eval.tasks.perplexity import compared, forced
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import Step, divergence, sampled_divergence, shared_start

REPLY_TOKENS = 128
# Added to a logit.
NEVER = -1e4


class Agreement(OwnTask):
    """The dense continuation of a text is forced, and at each step compared.

    Sampled at temperature 1, the mean KL counts all tokens and says how far, per token, the
    distributions of whole continuations are apart; greedy ones of small models go in circles.
    One is made once and kept in the user's cache, so that runs of other settings are of the same
    tokens.

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
        dense = Setting(DENSE)
        # Each server has its own: what two of them round differently is not the setting's doing.
        key = (session.url, sample.name)
        if key not in self._references:
            wanted = await _continuation(sample, session, client)
            self._references[key] = await forced(sample, wanted, dense, session, client)
        densely, theirs = self._references[key]
        wanted = [step.token_id for step in theirs]
        reply, mine = densely, theirs
        if setting != dense:
            reply, mine = await forced(sample, wanted, setting, session, client)
        followed = shared_start([step.best for step in mine], [step.best for step in theirs])
        # Only what dense's own distribution gave stands for the tokens that were not returned.
        drawn = session.options.temperature == session.options.repetition_penalty == 1
        kl = sampled_divergence if drawn else divergence
        found = compared(mine, theirs, kl) if len(mine) > 1 else {"top1": 1.0, "kl": 0.0}
        metrics = {"top1": found["top1"], "kl": found["kl"], "followed": followed / len(mine)}
        return metrics, reply


async def _continuation(sample: Sample, session: Session, client: Client) -> list[int]:
    sampling = _sampling(session.options)
    model, seed = session.results.conditions["model"], session.options.seed
    key = json.dumps([model, seed, sampling, sample.max_new_tokens, sample.prompt])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_dir() / "continuations" / f"{digest}.json"
    if not path.exists():
        # What follows an end is another text, of which the reply so far says nothing. By
        # min_new_tokens, SGLang 0.5.17 let most continuations of an H100 end all the same.
        bias = {str(session.tokenizer.eos_token_id): NEVER} if session.options.ignore_eos else None
        reply = await complete(sample, Setting(DENSE), session, client, **sampling, logit_bias=bias)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part-{os.getpid()}")
        part.write_text(json.dumps(reply["output_ids"]))
        # At once, and the first of several runs wins.
        with suppress(FileExistsError):
            path.hardlink_to(part)
        part.unlink()
    tokens: list[int] = json.loads(path.read_text())
    return tokens


def _sampling(options: Options) -> dict[str, Any]:
    return {
        "temperature": options.temperature,
        "repetition_penalty": options.repetition_penalty,
        "ignore_eos": options.ignore_eos,
    }
