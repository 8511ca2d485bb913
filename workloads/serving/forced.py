"""Make a served model follow given tokens, and see at each step what it would have said.

Every row of logits is replaced by its log-probabilities, the wanted token's by ``BIAS``, so that
greedy decoding takes it. What is returned is then every token's log-probability less ``BIAS``,
except the wanted one's, which a token that is not wanted carries, lifted above all others: it is
among the best returned. (To ask for one token's by ``token_ids_logprob`` ends SGLang up to 0.5.17
where other requests share the batch: sgl-project/sglang#34719.) The engine needs
``enable_custom_logit_processor=True``.
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

# Logit of the wanted token, and what lifts the carrier above all others.
BIAS, LIFT = 60.0, 30.0
# What is less likely counts as this. Beside sampled requests SGLang returns the logarithm of a
# float32 probability, and e^(FLOOR - BIAS) is the least of these.
FLOOR = -27.0
TOKENS = "forced_token_ids"
STEP = "forced_step"
RETRACTIONS = "forced_retractions"
CARRIER = "forced_carrier"
# Best tokens returned of every step.
TOP_TOKENS = 64


class ForceTokens(CustomLogitProcessor):
    """Takes the next of the request's ``forced_token_ids`` at every step; none left, the best."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """Rewrite the rows of ``logits``, ``[batch_size, vocab_size]``, float32."""
        rows, forced, carriers = [], [], []
        for row, params in zip(range(len(logits)), custom_param_list or [], strict=True):
            # SGLang's request. All chunks of a prompt come here, and only the last one's token
            # is kept.
            req = params.get("__req__")
            if req is not None and len(req.get_fill_ids()) < len(req.full_untruncated_fill_ids):
                continue
            # The step is counted here: under overlap scheduling the request's own output lags,
            # except where it was retracted and what was under way for it was dropped.
            step = params.get(STEP, 0)
            if req is not None and req.retraction_count != params.get(RETRACTIONS, 0):
                step, params[RETRACTIONS] = len(req.output_ids), req.retraction_count
            params[STEP] = step + 1
            if step < len(params[TOKENS]):
                rows.append(row)
                forced.append(params[TOKENS][step])
                carriers.append(params[CARRIER])
        if rows:
            held = logits[rows].log_softmax(dim=-1)
            places = list(range(len(rows)))
            held[places, carriers] = LIFT + held[places, forced].clamp(min=FLOOR)
            held[places, forced] = BIAS
            logits[rows] = held
        return logits


@dataclass(frozen=True)
class Step:
    """What the model held of one forced token and of the others. Log-probabilities in nats.

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
        """How far the forced token led the best other one; negative if it did not."""
        return self.logprob - max(self.others.values())

    @property
    def best(self) -> int:
        """The token that the model would have said itself."""
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
    """Parameters of ``Engine.generate`` and ``/generate`` that make it follow ``token_ids``.

    Args:
        token_ids: What the reply has to begin with.
        custom_params: The request's own, ``fasa`` among them.
        top_tokens: Best tokens to return of every step.
        free_tokens: Tokens that the model may add.
    """
    carrier = next(i for i in range(len(token_ids) + 1) if i not in token_ids)
    own = {TOKENS: list(token_ids), CARRIER: carrier}
    return {
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": len(token_ids) + free_tokens,
            # A conversation that is forced has ends of turns in it.
            "ignore_eos": True,
            "custom_params": {**custom_params, **own},
        },
        "custom_logit_processor": ForceTokens.to_str(),
        "return_logprob": True,
        # The forced token and the carrier are among them.
        "top_logprobs_num": top_tokens + 2,
    }


def steps(reply: Mapping[str, Any], token_ids: Sequence[int]) -> list[Step]:
    """Read a reply to ``forced_request``; the first step is the prefill's, the others decode's.

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
    """Refuse a reply that is not what was forced, or not all of it by decode steps.

    Raises:
        FasaError: Says where they part, or how often SGLang prefilled what had been decoded.
    """
    if retractions := reply["meta_info"].get("num_retractions"):
        raise FasaError(
            f"the server retracted a request {retractions} times and prefilled its tokens densely, "
            "so what it says of them is not what decoding would; lower --concurrency, or raise the "
            "server's --max-total-tokens"
        )
    said = list(reply["output_ids"][: len(token_ids)])
    if said == list(token_ids):
        return
    raise FasaError(
        f"the server did not follow the forced tokens from step {shared_start(said, token_ids)} of "
        f"{len(token_ids)}; is it an SGLang that this version of FASA was not tested with?"
    )


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences share before their first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def agreement(made: Sequence[Step]) -> float:
    """Share of the decode steps at which the model would have said the forced token itself."""
    decoded = made[1:]
    return sum(step.lead >= 0 for step in decoded) / len(decoded)


def divergence(reference: Step, step: Step) -> float:
    """Kullback-Leibler divergence of ``step`` from ``reference``, in nats.

    Tokens that only one of the two returned, and all that neither did, count as one outcome: the
    result is a lower bound, and exact if ``TOP_TOKENS`` covers all.
    """
    mine = {**step.others, step.token_id: step.logprob}
    theirs = {**reference.others, reference.token_id: reference.logprob}
    shared = mine.keys() & theirs.keys()
    total = sum(math.exp(theirs[token]) * (theirs[token] - mine[token]) for token in shared)
    rest, other_rest = (
        max(1e-7, 1 - sum(math.exp(held[token]) for token in shared)) for held in (theirs, mine)
    )
    return max(0.0, total + rest * math.log(rest / other_rest))


def sampled_divergence(reference: Step, step: Step) -> float:
    """The same where the forced token was drawn from ``reference``, in nats, and exact on average.

    The best tokens of both runs are summed up; of the others the forced one, where it is among
    them, speaks for all. A single step's may be negative.
    """
    mine, theirs = _best(step), _best(reference)
    shared = mine.keys() & theirs.keys()
    total = sum(math.exp(theirs[token]) * (theirs[token] - mine[token]) for token in shared)
    return total if step.token_id in shared else total + reference.logprob - step.logprob


def _best(step: Step) -> dict[int, float]:
    """As many tokens as were returned beside the forced one, so that it decides nothing."""
    held = {**step.others, step.token_id: step.logprob}
    return dict(heapq.nlargest(len(step.others), held.items(), key=lambda item: item[1]))
