"""A program over named two-digit values: a list of instructions that is repeated in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MODULUS = 100
# Begins the last line of the program and of the reply.
ANSWER = "answer:"
COPY, SWAP = "copy", "<>"
OPERATORS = ("+", "-", "max", "min", COPY, SWAP)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        operator: One of ``OPERATORS``.
        operands: Names that are read: one for a copy, else two.
        targets: Names that are written: both operands for a swap, else one.
    """

    operator: str
    operands: tuple[str, ...]
    targets: tuple[str, ...]

    def results(self, values: Sequence[int]) -> tuple[int, ...]:
        """Values of the targets, given those of the operands."""
        if self.operator == COPY:
            return (values[0],)
        left, right = values
        if self.operator == SWAP:
            return right, left
        results = {
            "+": (left + right) % MODULUS,
            "-": (left - right) % MODULUS,
            "max": max(left, right),
            "min": min(left, right),
        }
        return (results[self.operator],)

    def text(self, operands: Sequence[int] | None = None, targets: Sequence[int] = ()) -> str:
        """The instruction as in the program, or with its values as in the reply.

        Args:
            operands: Values of the operands; None leaves out all values.
            targets: Values of the targets.
        """
        if operands is None:
            left, right = list(self.operands), list(self.targets)
        else:
            left = [stated(*pair) for pair in zip(self.operands, operands, strict=True)]
            right = [stated(*pair) for pair in zip(self.targets, targets, strict=True)]
        return f"{f' {self.operator} '.join(left)} -> {', '.join(right)}"


@dataclass(frozen=True)
class Program:
    """A program and the names whose final values are its answer.

    Args:
        start: Value of every variable at the start.
        instructions: Executed in this order, in each round.
        rounds: How often.
        answer_names: Names whose final values are the answer.
    """

    start: Mapping[str, int]
    instructions: tuple[Instruction, ...]
    rounds: int
    answer_names: tuple[str, ...]

    def label(self, step: int) -> str:
        """Round and number of the instruction of a step, such as ``03.17``; steps count from 0."""
        round_index, index = divmod(step, len(self.instructions))
        return f"{round_index + 1:02}.{self.number(index)}"

    def number(self, index: int) -> str:
        """Number of an instruction, with as many digits as the largest."""
        return f"{index + 1:0{len(str(len(self.instructions)))}}"

    @property
    def steps(self) -> int:
        """Number of instructions that are executed."""
        return self.rounds * len(self.instructions)

    def instruction(self, step: int) -> Instruction:
        """The instruction of a step, from 0 to ``steps`` - 1."""
        return self.instructions[step % len(self.instructions)]

    def text(self) -> str:
        """The program as the prompt has it."""
        start = " ".join(stated(name, value) for name, value in self.start.items())
        lines = [f"start: {start}", f"repeat {self.rounds:02} rounds:"]
        lines += [f"{self.number(i)} {each.text()}" for i, each in enumerate(self.instructions)]
        return "\n".join([*lines, f"{ANSWER} {' '.join(self.answer_names)}"])


def stated(name: str, value: int) -> str:
    """A name with its value. The value always follows the name, so that it is found by it."""
    return f"{name}={value:02}"
