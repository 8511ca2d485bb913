"""Draw programs whose values are needed again long after they were written."""

from __future__ import annotations

import random

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.worksheet.names import NAMES
from fasa_sglang.workloads.eval.worksheet.program import COPY, MODULUS, SWAP, Instruction, Program

# Sums and differences dominate, because they pass every wrong value on to the answers.
WEIGHTS = {"+": 35, "-": 30, "max": 10, "min": 10, COPY: 15}
# Swaps per variable. A swap states old and new values side by side, which is harder to tell apart.
SWAP_SHARE = 0.05
# A variable is read only in the part of a round that follows its write. The value that the write
# replaced was last stated before it, at least 1 / REACH times as far back: attention tells near
# from far by the ratio of distances.
REACH = 0.6
# Each operand is the one of so many candidates that was stated longest ago.
CANDIDATES = 3
NUM_ANSWERS = 4
# Fewer leave some instruction without two operands in reach.
MIN_VARIABLES = 4
MAX_ROUNDS = 99


def draw_program(rng: random.Random, num_variables: int, rounds: int) -> Program:
    """Draw a program; equal arguments give equal programs.

    Each round writes every variable once, and swaps some.

    Args:
        rng: Source of randomness.
        num_variables: Number of variables. Look-backs grow in proportion to it.
        rounds: Number of rounds.

    Raises:
        FasaError: A number is out of range.
    """
    if not MIN_VARIABLES <= num_variables <= len(NAMES):
        raise FasaError(
            f"a worksheet has {MIN_VARIABLES} to {len(NAMES)} variables, got {num_variables}"
        )
    if not 1 <= rounds <= MAX_ROUNDS:
        raise FasaError(f"a worksheet has 1 to {MAX_ROUNDS} rounds, got {rounds}")
    names = rng.sample(NAMES, num_variables)
    # What each instruction writes; None is a swap.
    written: list[str | None] = [*names, *[None] * round(num_variables * SWAP_SHARE)]
    rng.shuffle(written)
    length = len(written)
    written_at = {name: i for i, name in enumerate(written) if name is not None}
    stated_at = {name: i - length for name, i in written_at.items()}

    def draw_operands(i: int, count: int) -> tuple[str, ...]:
        in_reach = [name for name in names if 0 < (i - written_at[name]) % length <= REACH * length]
        operands: list[str] = []
        for _ in range(count):
            others = [name for name in in_reach if name not in operands]
            drawn = rng.sample(others, min(CANDIDATES, len(others)))
            operands.append(min(drawn, key=lambda name: stated_at[name]))
        for name in operands:
            stated_at[name] = i
        return tuple(operands)

    instructions = []
    for i, name in enumerate(written):
        if name is None:
            operands = draw_operands(i, 2)
            instructions.append(Instruction(SWAP, operands, operands))
        else:
            [operator] = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            operands = draw_operands(i, 1 if operator == COPY else 2)
            instructions.append(Instruction(operator, operands, (name,)))
            stated_at[name] = i
    start = {name: rng.randrange(MODULUS) for name in names}
    recent = [name for name in names if length - written_at[name] <= REACH * length]
    answer_names = rng.sample(recent, min(NUM_ANSWERS, len(recent)))
    return Program(start, tuple(instructions), rounds, tuple(answer_names))
