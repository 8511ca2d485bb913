"""How many right replies a model would generate to programs that it was not trained on."""

from __future__ import annotations

from typing import Any

import torch

from fasa_sglang.workloads.eval.worksheet.batches import Batch, draw_sized, pad
from fasa_sglang.workloads.eval.worksheet.loss import right_tokens
from fasa_sglang.workloads.eval.worksheet.prompt import prompt_ids, reply_ids


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
        ``tokens``, ``lines`` and ``replies``: the shares that are right.
    """
    model.eval()
    device = next(model.parameters()).device
    [newline] = tokenizer("\n", add_special_tokens=False).input_ids
    tokens, lines, replies = [], [], []
    for i in range(num_programs):
        program = draw_sized(f"held-out-{reply_len}-{i}", tokenizer, reply_len)
        reply = reply_ids(tokenizer, program)
        batch = pad([(prompt_ids(tokenizer, program), reply)])
        batch = Batch(batch.ids.to(device), batch.targets.to(device))
        right = right_tokens(model, batch)[0, -len(reply) - 1 : -1].cpu()
        tokens.append(right.float().mean())
        replies.append(right.all().float())
        ends = [i + 1 for i, token in enumerate(reply) if token == newline]
        lines += [part.all().float() for part in right.tensor_split(ends)]
    shares = {"tokens": tokens, "lines": lines, "replies": replies}
    return {name: float(torch.stack(values).mean()) for name, values in shares.items()}
