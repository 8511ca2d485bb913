"""Facts that a model cannot know: the passcodes of made-up places."""

from __future__ import annotations

import random
import re

from fasa_sglang.workloads.words import COLOURS, PLACES

# Every selector finds a single needle; one among others of its kind is harder.
NUM_PASSCODES = 6
ANSWER_TOKENS = 24


def draw_codes(rng: random.Random) -> dict[str, str]:
    """``NUM_PASSCODES`` places with five digits each."""
    places = [f"{colour} {place}" for colour in COLOURS for place in PLACES]
    return {place: str(rng.randrange(10000, 100000)) for place in rng.sample(places, NUM_PASSCODES)}


def fact(place: str, code: str) -> str:
    """The sentence that states a passcode."""
    return f"The passcode of the {place} is {code}."


def score(answer: str, code: str) -> float:
    """1 if the first five digits of the answer are the code, else 0."""
    return float(re.findall(r"\d{5}", answer)[:1] == [code])
