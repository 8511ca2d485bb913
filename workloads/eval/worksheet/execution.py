"""The chain of thought that works a program off."""

from __future__ import annotations

from fasa_sglang.workloads.eval.worksheet.program import ANSWER, Program, stated


def expected_lines(program: Program) -> list[str]:
    """The right reply: one line per step, such as ``03.17 key=45 + oak=32 -> zoo=77``, then the
    answer."""
    values = dict(program.start)
    lines = []
    for step in range(program.steps):
        instruction = program.instruction(step)
        operands = [values[name] for name in instruction.operands]
        results = instruction.results(operands)
        values.update(zip(instruction.targets, results, strict=True))
        lines.append(f"{program.label(step)} {instruction.text(operands, results)}")
    answers = " ".join(stated(name, values[name]) for name in program.answer_names)
    return [*lines, f"{ANSWER} {answers}"]
