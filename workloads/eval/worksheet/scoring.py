"""The metrics of a reply."""

from __future__ import annotations

from collections.abc import Sequence

from fasa_sglang.workloads.eval.worksheet.execution import expected_lines
from fasa_sglang.workloads.eval.worksheet.look_ups import STATEMENT, LookUp, judge
from fasa_sglang.workloads.eval.worksheet.program import ANSWER, Program

# Lower ends of the ranges of look-back distances, in tokens.
DISTANCES = (0, 256, 512, 1024, 2048, 4096)
FROM_PROMPT = "look_up_prompt"


def score(program: Program, reply: str, token_starts: Sequence[int]) -> dict[str, float]:
    """Score a reply.

    Args:
        program: The program.
        reply: The reply's text.
        token_starts: First character of each of the reply's tokens.

    Returns:
        ``solved``, 1 if all answers are right; ``answers``, the share of right ones; ``lines``, the
        share of the expected lines before the first wrong one; ``look_up``, the share of right
        operands and answers, judged against the reply's own values; ``results``, the share of
        lines that calculate right; ``look_up_<distance>``, the shares by look-back distance, from
        that one of ``DISTANCES`` up to the next; ``look_up_prompt``, the share of values that are
        in the prompt only. Shares of nothing are left out.
    """
    judgement = judge(program, reply, token_starts)
    answers = _right_answers(program, reply)
    metrics = {
        "solved": float(answers == len(program.answer_names)),
        "answers": answers / len(program.answer_names),
        "lines": _right_lines(program, reply),
    }
    groups = {"look_up": [each.right for each in judgement.look_ups], "results": judgement.results}
    for look_up in judgement.look_ups:
        groups.setdefault(distance_key(look_up), []).append(look_up.right)
    return metrics | {key: sum(group) / len(group) for key, group in groups.items() if group}


def distance_key(look_up: LookUp) -> str:
    """The metric in which a look-up counts by its distance."""
    if look_up.distance is None:
        return FROM_PROMPT
    return f"look_up_{max(least for least in DISTANCES if least <= look_up.distance)}"


def _right_lines(program: Program, reply: str) -> float:
    expected = expected_lines(program)
    right = 0
    for line, given in zip(expected, reply.split("\n"), strict=False):
        if line != given:
            break
        right += 1
    return right / len(expected)


def _right_answers(program: Program, reply: str) -> int:
    expected = dict(STATEMENT.findall(expected_lines(program)[-1]))
    _, _, given = reply.partition(ANSWER)
    return sum(
        expected[name] == value
        for name, value in dict(STATEMENT.findall(given)).items()
        if name in expected
    )
