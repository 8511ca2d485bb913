"""A wrong reply loses what it got wrong, and nothing else."""

from __future__ import annotations

import re

import pytest

from fasa_sglang.workloads.eval.worksheet.execution import expected_lines
from fasa_sglang.workloads.eval.worksheet.look_ups import judge
from fasa_sglang.workloads.eval.worksheet.program import COPY, SWAP, Instruction, Program
from fasa_sglang.workloads.eval.worksheet.scoring import score

PROGRAM = Program(
    {"oak": 10, "key": 25, "zoo": 3},
    (
        Instruction("+", ("oak", "key"), ("zoo",)),
        Instruction(COPY, ("zoo",), ("oak",)),
        Instruction(SWAP, ("oak", "key"), ("oak", "key")),
        Instruction("-", ("oak", "key"), ("zoo",)),
    ),
    2,
    ("zoo", "key"),
)
LINES = [
    "01.1 oak=10 + key=25 -> zoo=35",
    "01.2 zoo=35 -> oak=35",
    "01.3 oak=35 <> key=25 -> oak=25, key=35",
    "01.4 oak=25 - key=35 -> zoo=90",
    "02.1 oak=25 + key=35 -> zoo=60",
    "02.2 zoo=60 -> oak=60",
    "02.3 oak=60 <> key=35 -> oak=35, key=60",
    "02.4 oak=35 - key=60 -> zoo=75",
    "answer: zoo=75 key=60",
]
RIGHT = "\n".join(LINES)


def characters(text: str) -> range:
    """A tokenizer whose tokens are characters."""
    return range(len(text))


def metrics(reply: str) -> dict[str, float]:
    return score(PROGRAM, reply, characters(reply))


def test_expected_lines_of_a_known_program() -> None:
    assert expected_lines(PROGRAM) == LINES


def test_score_of_the_right_reply_is_1() -> None:
    right = metrics(RIGHT)
    assert set(right.values()) == {1.0}
    assert {"solved", "answers", "lines", "look_up", "results", "look_up_prompt"} <= set(right)


def test_score_of_a_wrong_look_up_judges_later_lines_by_the_reply() -> None:
    """The stale 35 is passed on to the answer, but counts as one wrong look-up."""
    lines = list(LINES)
    lines[5] = "02.2 zoo=90 -> oak=90"
    lines[6] = "02.3 oak=90 <> key=35 -> oak=35, key=90"
    lines[7] = "02.4 oak=35 - key=90 -> zoo=45"
    lines[8] = "answer: zoo=45 key=90"
    reply = "\n".join(lines)
    scored = metrics(reply)
    assert (scored["solved"], scored["answers"], scored["lines"]) == (0, 0, 5 / 9)
    assert scored["results"] == 1
    wrong = [each for each in judge(PROGRAM, reply, characters(reply)).look_ups if not each.right]
    assert [(each.line, each.name) for each in wrong] == [(5, "zoo")]
    assert wrong[0].distance == RIGHT.index("zoo=60 -> oak") - RIGHT.index("zoo=60")


def test_score_of_a_wrong_sum_has_no_wrong_look_up() -> None:
    lines = list(LINES)
    lines[7] = "02.4 oak=35 - key=60 -> zoo=76"
    lines[8] = "answer: zoo=76 key=60"
    scored = metrics("\n".join(lines))
    assert scored["look_up"] == 1 and scored["results"] == 7 / 8
    assert (scored["solved"], scored["answers"], scored["lines"]) == (0, 0.5, 7 / 9)


def test_score_of_a_truncated_reply_counts_what_is_there() -> None:
    scored = metrics("\n".join(LINES[:4]) + "\n02.1 oak=25 + k")
    assert (scored["solved"], scored["answers"], scored["lines"]) == (0, 0, 4 / 9)
    assert scored["look_up"] == scored["results"] == 1


@pytest.mark.parametrize("reply", ["", "I cannot do that.", "answer:", "oak=10\n" * 50])
def test_score_of_another_text_is_0(reply: str) -> None:
    assert metrics(reply) == {"solved": 0, "answers": 0, "lines": 0}


def test_judge_passes_over_other_instructions_and_repetitions() -> None:
    other = LINES[0].replace("+", "-")
    reply = "\n".join([other, LINES[0], LINES[0].replace("35", "36"), *LINES[1:]])
    judged = judge(PROGRAM, reply, characters(reply))
    assert all(each.right for each in judged.look_ups) and all(judged.results)
    assert len(judged.results) == 8 and {each.line for each in judged.look_ups}.isdisjoint({0, 2})
    assert metrics(reply)["solved"] == 1 and metrics(reply)["lines"] == 0


def test_answers_with_a_wrong_name_are_wrong() -> None:
    reply = re.sub("answer: zoo", "answer: oak", RIGHT)
    assert metrics(reply)["answers"] == 0.5
