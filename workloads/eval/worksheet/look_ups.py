"""Judge a reply line by line against the values that the reply itself has written.

An early wrong value makes all that depends on it wrong. Judged against the reply's own values, each
line stands alone: an operand shows whether the model found what it had written, a result whether it
calculated right.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fasa_sglang.workloads.eval.worksheet.program import ANSWER, Program

STATEMENT = re.compile(r"(\w+)=(\d\d)\b")
VALUE = re.compile(r"=\d\d\b")


@dataclass(frozen=True)
class LookUp:
    """One value that the reply had to find again.

    Args:
        line: Index of the reply's line.
        name: The variable.
        distance: Tokens since the name was last stated in the reply, by an operand or a target;
            None if it was not, so that the value is in the prompt.
        right: Whether the value is the last one that the reply, or else the prompt, has for it.
    """

    line: int
    name: str
    distance: int | None
    right: bool


@dataclass
class Judgement:
    """What a reply's lines are worth, each on its own.

    Args:
        look_ups: In the order of the reply.
        results: For each line that executes an instruction, whether its results follow from the
            operands that it states.
    """

    look_ups: list[LookUp] = field(default_factory=list)
    results: list[bool] = field(default_factory=list)


def judge(program: Program, reply: str, token_starts: Sequence[int]) -> Judgement:
    """Judge a reply.

    Lines that are no instruction of the program in one of its rounds, and repetitions of a line
    that was judged, are passed over.

    Args:
        program: The program.
        reply: The reply's text.
        token_starts: First character of each of the reply's tokens, as ``token_starts`` returns.
    """
    judgement = Judgement()
    values = dict(program.start)
    stated_at: dict[str, int] = {}
    steps = {f"{program.label(i)} {program.instruction(i).text()}": i for i in range(program.steps)}
    answer = f"{ANSWER} {' '.join(program.answer_names)}"
    position = 0
    for number, line in enumerate(reply.split("\n")):
        bare = VALUE.sub("", line)
        step = steps.pop(bare, None)
        statements = [
            (match[1], int(match[2]), bisect_right(token_starts, position + match.start()))
            for match in STATEMENT.finditer(line)
        ]
        position += len(line) + 1
        if step is not None:
            instruction = program.instruction(step)
            num_operands = len(instruction.operands)
            expected = num_operands + len(instruction.targets)
        elif bare == answer:
            num_operands = expected = len(program.answer_names)
            answer = ""
        else:
            continue
        if len(statements) != expected:
            continue
        for name, value, token in statements[:num_operands]:
            distance = token - stated_at[name] if name in stated_at else None
            judgement.look_ups.append(LookUp(number, name, distance, value == values[name]))
            stated_at[name] = token
        if step is not None:
            operands = [value for _, value, _ in statements[:num_operands]]
            results = tuple(value for _, value, _ in statements[num_operands:])
            judgement.results.append(results == instruction.results(operands))
            for name, value, token in statements[num_operands:]:
                values[name] = value
                stated_at[name] = token
    return judgement


def token_starts(tokenizer: Any, text: str) -> list[int]:
    """First character of each token of a text, in rising order."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [start for start, _ in encoded.offset_mapping]
