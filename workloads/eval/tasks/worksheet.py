"""A program that the model works off line by line, looking up what it wrote long before."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from fasa_sglang.workloads.eval.sample_task import Sample, SampleTask, complete
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.task import Options, Session, TaskOption
from fasa_sglang.workloads.eval.worksheet.look_ups import judge, token_starts
from fasa_sglang.workloads.eval.worksheet.prompt import (
    draw_for_length,
    prompt_ids,
    reply_ids,
    reply_text,
)
from fasa_sglang.workloads.eval.worksheet.scoring import DISTANCES, distance_key, score
from fasa_sglang.workloads.serving.client import Client

REPLY_TOKENS = 4096
# A reply that goes astray may be longer than the right one; what follows is not worth decoding.
SPARE_TOKENS = 32


class Worksheet(SampleTask):
    """Metrics: whether the answers are right, and how many lines and look-ups are.

    ``--max-tokens`` is the length of the reply and sets the number of rounds.
    """

    name = "worksheet"
    metrics: ClassVar = {
        "solved": "share of programs with right answers",
        "lines": "share of lines before the first wrong one",
        "look_up": "share of values found again",
    }
    distances: ClassVar = {f"look_up_{least}": least for least in DISTANCES}
    task_options: ClassVar = (
        TaskOption("--variables", 48, "number of variables; look-backs grow with it"),
    )

    def conditions(self, options: Options) -> dict[str, Any]:
        """See ``Task.conditions``; there is no text, and the prompt has the length it has."""
        return {
            "seed": options.seed,
            "max_tokens": options.max_tokens or REPLY_TOKENS,
            "variables": options.own["variables"],
        }

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """One program each, which is the sample's data.

        ``info`` has the numbers of variables, rounds and tokens of the right reply, its look-ups by
        metric and the longest look-back.
        """
        samples = []
        for i in range(options.limit):
            program = draw_for_length(
                f"{options.seed}-{i}",
                tokenizer,
                options.own["variables"],
                options.max_tokens or REPLY_TOKENS,
            )
            text = reply_text(program)
            look_ups = judge(program, text, token_starts(tokenizer, text)).look_ups
            reply_len = len(reply_ids(tokenizer, program))
            info = {
                "variables": len(program.start),
                "rounds": program.rounds,
                "reply_tokens": reply_len,
                "look_ups": dict(Counter(map(distance_key, look_ups))),
                "longest": max(each.distance or 0 for each in look_ups),
            }
            prompt = prompt_ids(tokenizer, program)
            samples.append(Sample(f"{i}", prompt, reply_len + SPARE_TOKENS, info, program))
        return samples

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """See ``SampleTask.measure``."""
        reply = await complete(sample, setting, session, client)
        text = reply["text"]
        return score(sample.data, text, token_starts(session.tokenizer, text)), reply
