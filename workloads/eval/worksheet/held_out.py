"""How many right replies a model would generate to programs that it was not trained on."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from fasa_sglang.workloads.eval.worksheet.batches import Batch, draw_sized, pad
from fasa_sglang.workloads.eval.worksheet.look_ups import STATEMENT, token_starts
from fasa_sglang.workloads.eval.worksheet.loss import right_tokens
from fasa_sglang.workloads.eval.worksheet.prompt import prompt_ids, reply_ids, reply_text


def held_out_accuracy(
    model: Any, tokenizer: Any, reply_len: int, num_programs: int
) -> dict[str, float]:
    """Force right replies and see where the model would have deviated.

    A greedy reply is right to the last token exactly if none of these deviates.

    Args:
        model: A causal language model of transformers, on its device.
        tokenizer: Its tokenizer.
        reply_len: Largest length of a reply, in tokens.
        num_programs: How many programs to draw.

    Returns:
        The right shares of ``lines``, of values ``looked_up`` (operands and answers), of
        ``results``, of ``tokens`` and of ``replies``.
    """
    model.eval()
    device = next(model.parameters()).device
    found: dict[str, list[bool]] = {}
    for i in range(num_programs):
        program = draw_sized(f"held-out-{reply_len}-{i}", tokenizer, reply_len)
        reply = reply_ids(tokenizer, program)
        batch = pad([(prompt_ids(tokenizer, program), reply)])
        batch = Batch(batch.ids.to(device), batch.targets.to(device))
        right = right_tokens(model, batch)[0, -len(reply) - 1 : -1].tolist()
        for kind, spans in reply_spans(tokenizer, reply_text(program)).items():
            found.setdefault(kind, []).extend(all(right[start:end]) for start, end in spans)
        found.setdefault("tokens", []).extend(right)
        found.setdefault("replies", []).append(all(right))
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def reply_spans(tokenizer: Any, text: str) -> dict[str, list[tuple[int, int]]]:
    """First token and last token plus one of the parts of a right reply.

    Returns:
        ``lines``, with their ends, and the digits of values: ``looked_up`` and ``results``.
    """
    starts = token_starts(tokenizer, text)
    characters: dict[str, list[tuple[int, int]]] = {"lines": [], "looked_up": [], "results": []}
    position = 0
    for line in text.split("\n"):
        characters["lines"].append((position, position + len(line) + 1))
        operands = line.partition("->")[0]
        for match in STATEMENT.finditer(line):
            kind = "looked_up" if match.start() < len(operands) else "results"
            start, end = match.span(2)
            characters[kind].append((position + start, position + end))
        position += len(line) + 1
    return {
        kind: [(bisect_left(starts, start), bisect_left(starts, end)) for start, end in spans]
        for kind, spans in characters.items()
    }
