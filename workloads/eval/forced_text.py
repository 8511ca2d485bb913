"""Force a sample's reply and compare it, step by step, with a dense run of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fasa_sglang.workloads.eval.sample_task import Sample
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.task import Session
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import TOP_TOKENS, Step, divergence, forced_request, steps


async def force(
    sample: Sample, token_ids: Sequence[int], setting: Setting, session: Session, client: Client
) -> tuple[dict[str, Any], list[Step]]:
    """Force ``token_ids`` as the reply to a sample; returns the reply and its steps."""
    custom_params = {"fasa": session.fasa(setting)}
    body = forced_request(token_ids, custom_params, top_tokens=TOP_TOKENS)
    reply = await client.generate({"input_ids": sample.prompt, **body})
    return reply, steps(reply, token_ids)


def compare_steps(
    run: Sequence[Step],
    reference: Sequence[Step],
    distance: Callable[[Step, Step], float] = divergence,
) -> dict[str, float]:
    """Means over the decode steps; the first step belongs to the prefill, which is always dense.

    Returns:
        ``kl``, the divergence from ``reference`` in nats; ``nll``, the negative log-likelihood of
        the forced tokens in nats; ``top1``, the share of steps with the same best token.
    """
    pairs = list(zip(reference[1:], run[1:], strict=True))
    return {
        "kl": sum(distance(dense, step) for dense, step in pairs) / len(pairs),
        "nll": -sum(step.logprob for _, step in pairs) / len(pairs),
        "top1": sum(step.best == dense.best for dense, step in pairs) / len(pairs),
    }
