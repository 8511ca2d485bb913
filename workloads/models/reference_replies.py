"""Replies of transformers, which replies of SGLang are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.workloads.models.pretrained import load_causal_lm


def greedy_replies(
    folder: Path, prompts: Sequence[list[int]], num_tokens: int
) -> list[dict[str, Any]]:
    """What a model replies by the code of transformers, in float32 on a CPU.

    Args:
        folder: The model.
        prompts: Prompts as token ids.
        num_tokens: Length of every reply.

    Returns:
        The replies, with the parts of SGLang's replies that comparisons read.
    """
    model: Any = load_causal_lm(str(folder), "cpu", torch.float32)
    model.generation_config.eos_token_id = None
    replies = []
    for prompt in prompts:
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=num_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [logits[0].log_softmax(-1).topk(2).values.tolist() for logits in generated.logits]
        meta_info = {
            "prompt_tokens": len(prompt),
            "output_top_logprobs": [[(value,) for value in step] for step in best],
        }
        output_ids = generated.sequences[0, len(prompt) :].tolist()
        replies.append({"output_ids": output_ids, "meta_info": meta_info})
    return replies
