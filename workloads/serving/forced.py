"""Force a served model to generate given tokens, and read its own distribution at every step.

Every row of logits is replaced by its log-probabilities, and the forced token's entry by ``BIAS``,
so that greedy decoding takes that token. The returned values are then log-probabilities minus
``BIAS``. The forced token's own log-probability is stored in the entry of another token, the
*carrier*, lifted above all others so that it is always among the best ones returned. (Requesting it
with ``token_ids_logprob`` instead crashes SGLang up to 0.5.17 if other requests share the batch:
sgl-project/sglang#34719.) The engine needs ``enable_custom_logit_processor=True``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from fasa_sglang.errors import FasaError

# Logit of the forced token, and the lift that puts the carrier above all other tokens.
BIAS, LIFT = 60.0, 30.0
# Smallest log-probability that is reported. If sampled requests share the batch, SGLang returns the
# logarithm of a float32 probability, and e^(FLOOR - BIAS) is the smallest that float32 can hold.
FLOOR = -27.0
TOKENS = "forced_token_ids"
STEP = "forced_step"
RETRACTIONS = "forced_retractions"
CARRIER = "forced_carrier"
# Best tokens that are returned for every step.
TOP_TOKENS = 64


class ForceTokens(CustomLogitProcessor):
    """Forces the request's ``forced_token_ids``, one per step, then lets it decode freely."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """Rewrite the rows of ``logits``, ``[batch_size, vocab_size]``, float32."""
        rows, forced, carriers = [], [], []
        for row, params in zip(range(len(logits)), custom_param_list or [], strict=True):
            # SGLang's request. Every chunk of a prompt passes here, but only the last chunk's
            # token is used.
            req = params.get("__req__")
            if req is not None and len(req.get_fill_ids()) < len(req.full_untruncated_fill_ids):
                continue
            # Steps are counted here because the request's own output lags under overlap
            # scheduling. After a retraction, which drops the step in flight, it does not lag.
            step = params.get(STEP, 0)
            if req is not None and req.retraction_count != params.get(RETRACTIONS, 0):
                step, params[RETRACTIONS] = len(req.output_ids), req.retraction_count
            params[STEP] = step + 1
            if step < len(params[TOKENS]):
                rows.append(row)
                forced.append(params[TOKENS][step])
                carriers.append(params[CARRIER])
        if rows:
            logprobs = logits[rows].log_softmax(dim=-1)
            index = list(range(len(rows)))
            logprobs[index, carriers] = LIFT + logprobs[index, forced].clamp(min=FLOOR)
            logprobs[index, forced] = BIAS
            logits[rows] = logprobs
        return logits


@dataclass(frozen=True)
class Step:
    """The model's distribution at one forced token. Log-probabilities in nats.

    Args:
        token_id: The forced token.
        logprob: Its log-probability.
        others: Log-probabilities of the best other tokens.
    """

    token_id: int
    logprob: float
    others: Mapping[int, float]

    @property
    def lead(self) -> float:
        """Log-probability of the forced token minus that of the best other token."""
        return self.logprob - max(self.others.values())

    @property
    def best(self) -> int:
        """The token that greedy decoding would have generated."""
        if self.lead >= 0:
            return self.token_id
        return max(self.others, key=lambda token: self.others[token])


def forced_request(
    token_ids: Sequence[int],
    custom_params: Mapping[str, Any],
    *,
    top_tokens: int = 2,
    free_tokens: int = 0,
) -> dict[str, Any]:
    """Parameters of ``Engine.generate`` and ``/generate`` that force a reply.

    Args:
        token_ids: The tokens that the reply must begin with.
        custom_params: The request's ``custom_params``, such as ``fasa``.
        top_tokens: Number of best tokens to return for every step.
        free_tokens: Tokens that the model generates freely after ``token_ids``.
    """
    carrier = next(i for i in range(len(token_ids) + 1) if i not in token_ids)
    own = {TOKENS: list(token_ids), CARRIER: carrier}
    return {
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": len(token_ids) + free_tokens,
            # A forced conversation contains end-of-turn tokens.
            "ignore_eos": True,
            "custom_params": {**custom_params, **own},
        },
        "custom_logit_processor": ForceTokens.to_str(),
        "return_logprob": True,
        # Two more: the forced token and the carrier are among the best.
        "top_logprobs_num": top_tokens + 2,
    }


def steps(reply: Mapping[str, Any], token_ids: Sequence[int]) -> list[Step]:
    """Read the steps of a reply to ``forced_request``.

    Returns:
        One entry per forced token. The first one comes from the prefill, the others from decode
        steps.

    Raises:
        FasaError: See ``require_followed``.
    """
    require_followed(reply, token_ids)
    meta = reply["meta_info"]
    result = []
    for forced, top in zip(token_ids, meta["output_top_logprobs"], strict=False):
        others = {token: max(value + BIAS, FLOOR) for value, token, *_ in top if token != forced}
        carrier = max(others, key=lambda token: others[token])
        result.append(Step(forced, others.pop(carrier) - LIFT, others))
    return result


def require_followed(reply: Mapping[str, Any], token_ids: Sequence[int]) -> None:
    """Reject a reply that differs from the forced tokens or was partly prefilled.

    Raises:
        FasaError: Names the first step that differs, or the number of retractions, after which
            SGLang prefills tokens that had been decoded.
    """
    if retractions := reply["meta_info"].get("num_retractions"):
        raise FasaError(
            f"the server retracted a request {retractions} times and prefilled its tokens densely, "
            "so their probabilities are not those of sparse decoding; lower --concurrency, or "
            "raise the server's --max-total-tokens"
        )
    output = list(reply["output_ids"][: len(token_ids)])
    if output == list(token_ids):
        return
    raise FasaError(
        "the server did not follow the forced tokens from step "
        f"{shared_start(output, token_ids)} of {len(token_ids)}; run fasa doctor to check that its "
        "SGLang version is supported"
    )


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of items before the first difference between two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def agreement(run: Sequence[Step]) -> float:
    """Share of decode steps at which greedy decoding would have generated the forced token."""
    decoded = run[1:]
    return sum(step.lead >= 0 for step in decoded) / len(decoded)


def divergence(reference: Step, step: Step) -> float:
    """Kullback-Leibler divergence of ``step`` from ``reference``, in nats.

    Tokens that only one of the two steps returned count as one outcome, together with those that
    neither returned. The result is a lower bound, and exact if ``TOP_TOKENS`` covers the
    vocabulary.
    """
    p, q = _distribution(reference), _distribution(step)
    shared = p.keys() & q.keys()
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    p_rest, q_rest = (
        max(1e-7, 1 - sum(math.exp(logprobs[token]) for token in shared)) for logprobs in (p, q)
    )
    return max(0.0, total + p_rest * math.log(p_rest / q_rest))


def sampled_divergence(reference: Step, step: Step) -> float:
    """Unbiased estimate of the divergence, in nats, from a token drawn from ``reference``.

    The forced token of both steps must be that token. The terms of the best tokens of both steps
    are summed exactly. All other tokens are represented by the forced one if it is not among the
    best. The estimate of a single step may be negative.
    """
    p, q = _best(reference), _best(step)
    shared = p.keys() & q.keys()
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    return total if step.token_id in shared else total + reference.logprob - step.logprob


def _distribution(step: Step) -> dict[int, float]:
    return {**step.others, step.token_id: step.logprob}


def _best(step: Step) -> dict[int, float]:
    """The best tokens, as many as ``others`` has, so that the forced one is not favoured."""
    best = heapq.nlargest(len(step.others), _distribution(step).items(), key=lambda item: item[1])
    return dict(best)
