"""Programs are equal for equal seeds, and their replies say what the programs compute."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.worksheet.execution import expected_lines
from fasa_sglang.workloads.eval.worksheet.generator import REACH, draw_program
from fasa_sglang.workloads.eval.worksheet.look_ups import LookUp, judge, token_starts
from fasa_sglang.workloads.eval.worksheet.names import NAMES
from fasa_sglang.workloads.eval.worksheet.program import OPERATORS, SWAP, Program
from fasa_sglang.workloads.eval.worksheet.prompt import draw_for_length, reply_ids, reply_text
from fasa_sglang.workloads.models.pretrained import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return load_tokenizer(str(smollm2_path))


def program(seed: int, num_variables: int = 40, rounds: int = 3) -> Program:
    return draw_program(random.Random(seed), num_variables, rounds)


def execute(text: str) -> list[str]:
    """Work off the text of a program, independently of the package."""
    start, repeat, *instructions, answer = text.split("\n")
    values = {}
    for pair in start.removeprefix("start: ").split():
        name, value = pair.split("=")
        values[name] = int(value)

    def show(name: str) -> str:
        return name + "=" + str(values[name]).zfill(2)

    lines = []
    for round_number in range(1, int(repeat.split()[1]) + 1):
        for instruction in instructions:
            number, left, *rest = instruction.split(" -> ")[0].split(" ")
            targets = instruction.split(" -> ")[1].split(", ")
            before = show(left)
            result = [values[left]]
            if rest:
                operator, right = rest
                before += f" {operator} {show(right)}"
                a, b = values[left], values[right]
                if operator == "<>":
                    result = [b, a]
                elif operator in ("max", "min"):
                    result = [sorted([a, b])[operator == "max"]]
                else:
                    result = [(a + b if operator == "+" else a - b + 100) % 100]
            for name, value in zip(targets, result, strict=True):
                values[name] = value
            after = ", ".join(show(name) for name in targets)
            lines.append(f"{round_number:02}.{number} {before} -> {after}")
    return [*lines, "answer: " + " ".join(show(name) for name in answer.split()[1:])]


def test_draw_program_with_equal_seeds_is_equal() -> None:
    assert program(1) == program(1)
    assert program(1).text() != program(2).text()


def test_draw_program_does_not_depend_on_its_rounds() -> None:
    assert program(1, rounds=2).instructions == program(1, rounds=9).instructions


@pytest.mark.parametrize(
    ("num_variables", "rounds"), [(4, 5), (5, 3), (11, 3), (40, 3), (101, 2), (len(NAMES), 1)]
)
def test_expected_lines_are_what_the_text_computes(num_variables: int, rounds: int) -> None:
    for seed in range(3):
        drawn = program(seed, num_variables, rounds)
        assert expected_lines(drawn) == execute(drawn.text())


def test_draw_program_uses_every_operator() -> None:
    assert {each.operator for each in program(0, 200).instructions} == set(OPERATORS)


def test_draw_program_reads_a_variable_only_while_its_older_value_is_far() -> None:
    drawn = program(3, 60)
    length = len(drawn.instructions)
    written_at = {
        name: i
        for i, each in enumerate(drawn.instructions)
        for name in each.targets
        if each.operator != SWAP
    }
    assert sorted(written_at) == sorted(drawn.start)
    for i, each in enumerate(drawn.instructions):
        for name in each.operands:
            assert 0 < (i - written_at[name]) % length <= REACH * length


@pytest.mark.parametrize(
    ("num_variables", "rounds", "reason"),
    [(3, 2, "4 to [0-9]+ variables, got 3"), (8, 100, "1 to 99 rounds, got 100")],
)
def test_draw_program_out_of_range_is_refused(num_variables: int, rounds: int, reason: str) -> None:
    with pytest.raises(FasaError, match=reason):
        program(0, num_variables, rounds)


def test_draw_for_length_fills_the_reply(tokenizer: Any) -> None:
    for reply_len in (600, 2000):
        drawn = draw_for_length("0", tokenizer, 12, reply_len)
        longer = Program(drawn.start, drawn.instructions, drawn.rounds + 1, drawn.answer_names)
        assert len(reply_ids(tokenizer, drawn)) <= reply_len < len(reply_ids(tokenizer, longer))
    with pytest.raises(FasaError, match=r"one round of 40 variables takes \d+ tokens, more than"):
        draw_for_length("0", tokenizer, 40, 600)


def test_names_are_single_tokens(tokenizer: Any) -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(len(tokenizer(f" {name}").input_ids) == 1 for name in NAMES)


def test_distances_count_tokens_since_a_name_was_last_stated(tokenizer: Any) -> None:
    drawn = program(5, 30)
    text = reply_text(drawn)
    ids = tokenizer(text).input_ids
    names = {tokenizer(f" {name}").input_ids[0]: name for name in drawn.start}
    # The names in the reply, with their tokens: those that a "->" precedes are written.
    expected: list[LookUp] = []
    stated: dict[str, int] = {}
    line, written = 0, False
    for i, token in enumerate(ids):
        piece = tokenizer.decode([token])
        if piece == "\n":
            line, written = line + 1, False
        elif piece == " ->":
            written = True
        elif token in names:
            name = names[token]
            if not written:
                distance = i - stated[name] if name in stated else None
                expected.append(LookUp(line, name, distance, True))
            stated[name] = i
    assert judge(drawn, text, token_starts(tokenizer, text)).look_ups == expected
    distances = [each.distance for each in expected if each.distance]
    assert max(distances) > 300
