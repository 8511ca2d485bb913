"""Prompt and reply of a program as token ids."""

from __future__ import annotations

import random
from typing import Any

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.worksheet.execution import expected_lines
from fasa_sglang.workloads.eval.worksheet.generator import MAX_ROUNDS, draw_program
from fasa_sglang.workloads.eval.worksheet.program import Program
from fasa_sglang.workloads.serving.chat import chat_ids

# Its names are no variables, so that their values are never taken for those of a program.
TASK = (
    "Work this program off, one line per instruction, with the round and all values, as in "
    "`01.7 a=45 + b=82 -> c=27`. Values are modulo 100. End with the values of the answer."
)


def prompt_ids(tokenizer: Any, program: Program) -> list[int]:
    """The prompt of a program, up to the point where the reply begins."""
    content = f"{TASK}\n\n{program.text()}"
    return chat_ids(tokenizer, [{"role": "user", "content": content}])


def reply_text(program: Program) -> str:
    """The right reply."""
    return "\n".join(expected_lines(program))


def reply_ids(tokenizer: Any, program: Program) -> list[int]:
    """The right reply, which ends with the token that ends a turn."""
    ids: list[int] = tokenizer(reply_text(program), add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id]


def draw_for_length(seed: str, tokenizer: Any, num_variables: int, reply_len: int) -> Program:
    """Draw a program with as many rounds as a reply of ``reply_len`` tokens has room for.

    Raises:
        FasaError: There is no room for one round, or the number of variables is out of range.
    """
    one_round = draw_program(random.Random(seed), num_variables, 1)
    *lines, answer = expected_lines(one_round)
    round_len, answer_len = (
        len(tokenizer(text, add_special_tokens=False).input_ids)
        for text in ("\n".join([*lines, ""]), answer)
    )
    rounds = (reply_len - answer_len - 1) // round_len
    if rounds < 1:
        raise FasaError(
            f"one round of {num_variables} variables takes {round_len + answer_len + 1} tokens, "
            f"more than the reply's {reply_len}; give a larger --max-tokens or fewer --variables"
        )
    return draw_program(random.Random(seed), num_variables, min(rounds, MAX_ROUNDS))
