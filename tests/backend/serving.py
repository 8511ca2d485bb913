"""Engines for the tests, and what it means that two runs gave the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Sums depend on the batch's shape. Where the two best tokens are this close, either may win
# without a fault; such a divergence is listed and counts as equal. A CPU serves float32, a GPU
# bfloat16, whose step is 1/8 for logits from 16 to 32.
MARGIN = 0.125 if torch.cuda.is_available() else 1e-4


def generate(
    engine: Any,
    prompts: Sequence[list[int]],
    fasa: Sequence[Any],
    max_new_tokens: int,
    return_logprob: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """Send a batch of token-id prompts, each with its own ``fasa`` parameter, greedily.

    ``more`` goes into the sampling parameters.
    """
    sampling_params = []
    for asked in fasa:
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens, **more}
        if asked is not None:
            params["custom_params"] = {"fasa": asked}
        sampling_params.append(params)
    return engine.generate(
        input_ids=list(prompts),
        sampling_params=sampling_params,
        return_logprob=return_logprob,
        top_logprobs_num=2 if return_logprob else 0,
    )


def margins(reply: dict[str, Any]) -> list[float]:
    """Lead of the chosen token over the next best, per output token, in nats."""
    return [top[0][0] - top[1][0] for top in reply["meta_info"]["output_top_logprobs"]]


def divergence(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    """What differs between two greedy replies; None if nothing does that counts.

    ``expected`` carries log-probabilities. A difference at a near tie is printed.
    """
    wanted, came = expected["output_ids"], got["output_ids"]
    if wanted == came:
        return None
    step = next(
        (i for i, pair in enumerate(zip(wanted, came, strict=False)) if pair[0] != pair[1]),
        min(len(wanted), len(came)),
    )
    if step < len(wanted) and margins(expected)[step] < MARGIN:
        print(f"near tie at step {step}, margin {margins(expected)[step]:.1e}: counts as equal")
        return None
    prompt_tokens = expected["meta_info"]["prompt_tokens"]
    return f"prompt of {prompt_tokens} tokens differs at step {step}: {wanted} against {came}"
