"""Passcodes hidden in a long prompt, one of them asked for, at every depth."""

from __future__ import annotations

import random
import re
from typing import Any

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.bench.agent import COLOURS
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.tasks.base import (
    Options,
    OwnTask,
    Sample,
    Session,
    chat_ids,
    complete,
    text_ids,
)
from fasa_sglang.workloads.serving.client import Client

PLACES = [
    "attic",
    "barn",
    "cabin",
    "depot",
    "garage",
    "harbour",
    "kiosk",
    "library",
    "mill",
    "vault",
]
# A single plain needle is found by every selector; among others of its kind it is not.
NEEDLES = 6
DEPTHS = 10
LENGTHS = 4
LEAST_TEXT = 64
ANSWER_TOKENS = 24


class Needle(OwnTask):
    """Metric: the asked passcode is the first number of the answer.

    Prompts have ``LENGTHS`` lengths up to ``--length``, the asked one lies at ``DEPTHS`` depths,
    the others anywhere.
    """

    metrics = ("accuracy",)

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """A sample per length and depth in turn, each of its own text and codes."""
        ids = text_ids(tokenizer, options.text, options.length + 1)
        made = []
        for i in range(options.limit):
            draw = random.Random(f"{options.seed}-{i}")
            depth = (i % DEPTHS) / (DEPTHS - 1)
            length = options.length * (i // DEPTHS % LENGTHS + 1) // LENGTHS
            codes = draw_codes(draw, NEEDLES)
            asked = draw.choice(sorted(codes))
            question = f"What is the passcode of the {asked}? Answer with one sentence."
            facts = {name: f" {fact(name, code)}" for name, code in codes.items()}
            room = length - sum(len(tokenizer(told).input_ids) for told in facts.values()) - 80
            if room < LEAST_TEXT:
                raise FasaError(
                    f"needles in {length} tokens leave {room} for the text around them, expected "
                    f"{LEAST_TEXT} or more; give a larger --length"
                )
            start = draw.randrange(len(ids) - room)
            text = ids[start : start + room]
            depths = {name: depth if name == asked else draw.random() for name in facts}
            pieces, position = [], 0
            for name in sorted(facts, key=lambda name: depths[name]):
                end = round(depths[name] * room)
                pieces += [tokenizer.decode(text[position:end]), facts[name]]
                position = end
            pieces.append(tokenizer.decode(text[position:]))
            prompt = chat_ids(tokenizer, f"{''.join(pieces)}\n\n{question}")
            info = {"length": length, "depth": round(depth, 3)}
            made.append(Sample(f"{i}", prompt, ANSWER_TOKENS, info, codes[asked]))
        return made

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Ask."""
        reply = await complete(sample, setting, session, client)
        return {"accuracy": right(reply["text"], sample.data)}, reply


def draw_codes(draw: random.Random, count: int) -> dict[str, str]:
    """Names of places and their five digits."""
    names = draw.sample([f"{colour} {place}" for colour in COLOURS for place in PLACES], count)
    return {name: str(draw.randrange(10000, 100000)) for name in names}


def fact(name: str, code: str) -> str:
    """What is to be remembered."""
    return f"The passcode of the {name} is {code}."


def right(answer: str, code: str) -> float:
    """1 if the first five digits of the answer are the code, else 0."""
    return float(re.findall(r"\d{5}", answer)[:1] == [code])
