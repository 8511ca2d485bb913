"""Greedy replies of an engine, and whether two of them are equal up to near ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Sums depend on the shape of the batch, so where the two best tokens are this close, either may
# win without a fault. A divergence there is printed and counts as equal. A CPU serves float32. A
# GPU serves bfloat16, where the random models' logits come in steps of 1/32: of 216 replies that
# diverged from SGLang's own backend, 77 did at a tie, 107 at one step, 28 at two, 3 at three and
# 1 above. The slack is for the rounding of log-probabilities.
MARGIN = 3 / 32 + 1e-3 if torch.cuda.is_available() else 1e-4


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
    for parameter in fasa:
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens, **more}
        if parameter is not None:
            params["custom_params"] = {"fasa": parameter}
        sampling_params.append(params)
    replies: list[dict[str, Any]] = engine.generate(
        input_ids=list(prompts),
        sampling_params=sampling_params,
        return_logprob=return_logprob,
        top_logprobs_num=2 if return_logprob else 0,
    )
    return replies


def margins(reply: dict[str, Any]) -> list[float]:
    """Lead of the chosen token over the next best, per output token, in nats."""
    return [top[0][0] - top[1][0] for top in reply["meta_info"]["output_top_logprobs"]]


def divergence(
    expected: dict[str, Any], got: dict[str, Any], near_tie: float = MARGIN
) -> str | None:
    """How two greedy replies differ; None if they are equal up to a near tie, which is printed.

    ``expected`` carries log-probabilities. Whatever follows a near tie is not compared, so whoever
    compares many replies has to limit how many steps that leaves out: see ``agreeing_steps``.
    """
    expected_ids, got_ids = expected["output_ids"], got["output_ids"]
    if expected_ids == got_ids:
        return None
    step = agreeing_steps(expected_ids, got_ids)
    margin = margins(expected)[step] if step < len(expected_ids) else float("inf")
    if margin < near_tie:
        print(f"near tie at step {step}, margin {margin:.1e}: counts as equal")
        return None
    return (
        f"prompt of {expected['meta_info']['prompt_tokens']} tokens differs at step {step}, "
        f"margin {margin:.1e}: {expected_ids} against {got_ids}"
    )


def agreeing_steps(expected_ids: list[int], got_ids: list[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(expected_ids, got_ids, strict=False))
    return next(
        (i for i, (expected, got) in pairs if expected != got),
        min(len(expected_ids), len(got_ids)),
    )
