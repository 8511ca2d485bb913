"""How closely a sparse run follows the model's own dense continuation of a text."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

from fasa_sglang.calibration_cache import cache_dir
from fasa_sglang.workloads.eval.forced_text import compare_steps, force
from fasa_sglang.workloads.eval.sample_task import Sample, SampleTask, complete
from fasa_sglang.workloads.eval.settings import DENSE, Setting
from fasa_sglang.workloads.eval.task import Options, Session, TaskOption
from fasa_sglang.workloads.eval.text_prompts import text_pieces
from fasa_sglang.workloads.publish import published
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import Step, divergence, sampled_divergence, shared_start

REPLY_TOKENS = 128
# Added to the logit of a token that must not be generated.
NEVER = -1e4


class Agreement(SampleTask):
    """The dense continuation of a text is forced in every setting and compared step by step.

    If it was sampled at temperature 1, the mean KL covers the whole vocabulary and is the
    divergence per token between the distributions of continuations. Greedy continuations of small
    models repeat themselves. A continuation is generated once and cached for the user, so that runs
    with other settings use the same tokens.
    """

    name = "agreement"
    metrics: ClassVar = {
        "top1": "share of steps with dense decoding's best token",
        "kl": "next-token KL divergence from dense decoding, nats",
        "followed": "share of the reply before the first different best token",
    }
    task_options: ClassVar = (
        TaskOption("--repetition-penalty", 1.0, "repetition penalty of the dense continuations"),
        TaskOption("--ignore-eos", False, "continue where the model would end its turn"),
    )

    def conditions(self, options: Options) -> dict[str, Any]:
        """See ``Task.conditions``."""
        return {**super().conditions(options), **_sampling(options)}

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """One piece of the text each."""
        tokens = options.max_tokens or REPLY_TOKENS
        self._references: dict[tuple[str, str], tuple[dict[str, Any], list[Step]]] = {}
        return [Sample(name, piece, tokens) for name, piece in text_pieces(tokenizer, options)]

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Force the dense continuation."""
        dense = Setting(DENSE)
        # Keep one reference per server: rounding differs between servers and must not count
        # against a setting.
        key = (session.url, sample.name)
        if key not in self._references:
            continuation = await _continuation(sample, session, client)
            self._references[key] = await force(sample, continuation, dense, session, client)
        reply, reference = self._references[key]
        run = reference
        if setting != dense:
            token_ids = [step.token_id for step in reference]
            reply, run = await force(sample, token_ids, setting, session, client)
        followed = shared_start([step.best for step in run], [step.best for step in reference])
        # The estimate holds only for tokens drawn from the dense distribution itself.
        options = session.options
        drawn = options.temperature == options.own["repetition_penalty"] == 1
        distance = sampled_divergence if drawn else divergence
        means = (
            compare_steps(run, reference, distance) if len(run) > 1 else {"top1": 1.0, "kl": 0.0}
        )
        metrics = {"top1": means["top1"], "kl": means["kl"], "followed": followed / len(run)}
        return metrics, reply


async def _continuation(sample: Sample, session: Session, client: Client) -> list[int]:
    """The dense continuation of a sample, from the user's cache if it was generated before."""
    sampling = _sampling(session.options)
    model, seed = session.results.conditions["model"], session.options.seed
    key = json.dumps([model, seed, sampling, sample.max_new_tokens, sample.prompt])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_dir() / "continuations" / f"{digest}.json"
    if not path.exists():
        # Text after an end-of-turn token is unrelated to the reply before it. SGLang 0.5.17's
        # min_new_tokens does not prevent that token on a GPU, a bias does.
        never = {str(session.tokenizer.eos_token_id): NEVER}
        bias = never if sampling["ignore_eos"] else None
        reply = await complete(sample, Setting(DENSE), session, client, **sampling, logit_bias=bias)
        with published(path) as part:
            part.write_text(json.dumps(reply["output_ids"]))
    tokens: list[int] = json.loads(path.read_text())
    return tokens


def _sampling(options: Options) -> dict[str, Any]:
    own = {option.name: options.own[option.name] for option in Agreement.task_options}
    return {"temperature": options.temperature, **own}
