"""Make a served model follow given tokens, and see at each step what it would have said.

The wanted token's logit is raised by ``BIAS``, so that greedy decoding takes it, while the
returned log-probabilities still show how it stood against the best other token. The engine needs
``enable_custom_logit_processor=True``.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

# Larger than any lead another token has, and small enough to leave float32 log-probabilities
# exact to 1e-5.
BIAS = 100.0
TOKENS = "forced_token_ids"
STEP = "forced_step"


class ForceTokens(CustomLogitProcessor):
    """Raises the next of the request's ``forced_token_ids`` at every step."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """Add the bias to one logit of each row of ``logits``, ``[batch_size, vocab_size]``."""
        for row, params in zip(logits, custom_param_list or [], strict=True):
            # The step is counted here: under overlap scheduling the request's own output lags.
            step = params.get(STEP, 0)
            params[STEP] = step + 1
            if step < len(params[TOKENS]):
                row[params[TOKENS][step]] += BIAS
        return logits


def forced_request(token_ids: list[int], custom_params: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``Engine.generate`` that make it follow ``token_ids``."""
    return {
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": len(token_ids),
            "ignore_eos": True,
            "custom_params": {**custom_params, TOKENS: list(token_ids)},
        },
        "custom_logit_processor": ForceTokens.to_str(),
        "return_logprob": True,
        "top_logprobs_num": 2,
    }


def leads(reply: dict[str, Any]) -> list[float]:
    """How far each forced token led the best other token, in nats; negative if it did not.

    The first one comes from the prefill, the others from decode steps.
    """
    result = []
    meta = reply["meta_info"]
    for (forced, token_id, *_), top in zip(
        meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True
    ):
        best_other = max(logprob for logprob, other, *_ in top if other != token_id)
        result.append(forced - BIAS - best_other)
    return result


def agreement(reply: dict[str, Any]) -> float:
    """Share of the decode steps at which the model would have said the forced token itself."""
    decoded = leads(reply)[1:]
    return sum(lead >= 0 for lead in decoded) / len(decoded)
