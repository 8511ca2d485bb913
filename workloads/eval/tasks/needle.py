"""Passcodes hidden at every depth of a long prompt, one of which the model is asked for."""

from __future__ import annotations

import random
from typing import Any, ClassVar

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.passcodes import ANSWER_TOKENS, draw_codes, fact, score
from fasa_sglang.workloads.eval.sample_task import Sample, SampleTask, complete
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.task import Options, Session
from fasa_sglang.workloads.eval.text_prompts import text_ids
from fasa_sglang.workloads.serving.chat import chat_ids
from fasa_sglang.workloads.serving.client import Client

DEPTHS = 10
LENGTHS = 4
MIN_TEXT = 64
# Room for the question and the chat template.
QUESTION_TOKENS = 80


class Needle(SampleTask):
    """Metric: whether the first number of the answer is the right passcode.

    Prompts have ``LENGTHS`` lengths up to ``--length``. The passcode in question lies at one of
    ``DEPTHS`` depths, the others lie anywhere.
    """

    name = "needle"
    metrics: ClassVar = {"accuracy": "share of right answers"}

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """One sample per length and depth in turn, each with its own text and codes."""
        ids = text_ids(tokenizer, options.text, options.length + 1)
        samples = []
        for i in range(options.limit):
            rng = random.Random(f"{options.seed}-{i}")
            depth = (i % DEPTHS) / (DEPTHS - 1)
            length = options.length * (i // DEPTHS % LENGTHS + 1) // LENGTHS
            codes = draw_codes(rng)
            target = rng.choice(sorted(codes))
            question = f"What is the passcode of the {target}? Answer with one sentence."
            facts = {place: f" {fact(place, code)}" for place, code in codes.items()}
            fact_tokens = sum(len(tokenizer(text).input_ids) for text in facts.values())
            room = length - fact_tokens - QUESTION_TOKENS
            if room < MIN_TEXT:
                raise FasaError(
                    f"needles in {length} tokens leave {room} for the text around them, expected "
                    f"{MIN_TEXT} or more; give a larger --length"
                )
            start = rng.randrange(len(ids) - room)
            text = ids[start : start + room]
            depths = {place: depth if place == target else rng.random() for place in facts}
            pieces, position = [], 0
            for place in sorted(facts, key=lambda place: depths[place]):
                end = round(depths[place] * room)
                pieces += [tokenizer.decode(text[position:end]), facts[place]]
                position = end
            pieces.append(tokenizer.decode(text[position:]))
            content = f"{''.join(pieces)}\n\n{question}"
            prompt = chat_ids(tokenizer, [{"role": "user", "content": content}])
            info = {"length": length, "depth": round(depth, 3)}
            samples.append(Sample(f"{i}", prompt, ANSWER_TOKENS, info, codes[target]))
        return samples

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """See ``SampleTask.measure``."""
        reply = await complete(sample, setting, session, client)
        return {"accuracy": score(reply["text"], sample.data)}, reply
