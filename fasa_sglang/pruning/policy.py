"""Which generated tokens are pruned, and when."""

from __future__ import annotations

import torch

from fasa_sglang.config import FasaConfig
from fasa_sglang.pruning.importance import Importance
from fasa_sglang.requests import FasaRequest


def prunable_range(
    request: FasaRequest,
    config: FasaConfig,
    *,
    prompt_len: int,
    protected_len: int,
    scored_from: int,
    seq_len: int,
    think_end: int | None,
) -> tuple[int, int]:
    """First and last position, exclusive, that may be pruned now; empty unless start < end.

    Each of these tokens was scored by at least ``prune_grace`` finished steps.

    Args:
        request: The request's parameters.
        config: The server's settings.
        prompt_len: Tokens of the prompt.
        protected_len: Leading tokens whose slots the radix tree owns. After a retraction these
            include generated tokens.
        scored_from: Tokens of the request before its first sparse step.
        seq_len: Tokens of the request. The step of the last one may still be running.
        think_end: Position at which the thinking ended; None if it has not, or does not matter.
    """
    start = max(prompt_len, protected_len, request.sink)
    finished_len = seq_len - 1
    if finished_len - scored_from < config.prune_grace:
        return start, start
    # The step that generates the next token is the first one that scores a token.
    end = min(seq_len - max(config.prune_recent, request.recent), finished_len - config.prune_grace)
    if think_end is not None:
        end = min(end, think_end)
    return start, end


def num_victims(
    request: FasaRequest,
    config: FasaConfig,
    *,
    pruned: int,
    start: int,
    end: int,
    seq_len: int,
    think_end: int | None,
) -> int:
    """Tokens to prune now so that ``prune_budget`` remain.

    Nothing is pruned until the request exceeds its budget by ``prune_interval``.

    Args:
        request: The request's parameters.
        config: The server's settings.
        pruned: Tombstones; all lie between ``start`` and ``end``.
        start: Start of the prunable range.
        end: End of the prunable range.
        seq_len: Tokens of the request.
        think_end: As for ``prunable_range``; later tokens do not count towards the budget.
    """
    counted = seq_len if think_end is None else min(seq_len, think_end)
    excess = counted - start - pruned - request.prune_budget
    if excess < config.prune_interval:
        return 0
    return max(0, min(excess, end - start - pruned))


def choose_victims(
    importance: Importance, slots: torch.Tensor, count: int, rule: str, seed: int
) -> torch.Tensor:
    """Choose the tokens to prune. Does not synchronise.

    Args:
        importance: Selection averages per KV slot.
        slots: Slots of the prunable tokens, in order, ``[N]``, int64; tombstones are 0.
        count: Tokens to choose; at most as many as have a slot.
        rule: ``fasa`` takes the least selected, ``oldest`` the first, ``random`` any.
        seed: Seed of ``random``.

    Returns:
        Indices into ``slots``, ``[count]``, int64.
    """
    if rule == "fasa":
        worth = importance.average[slots]
    elif rule == "oldest":
        worth = torch.arange(len(slots), dtype=torch.float32, device=slots.device)
    else:
        generator = torch.Generator().manual_seed(seed)
        worth = torch.rand(len(slots), generator=generator).to(slots.device)
    return worth.masked_fill(slots == 0, torch.inf).topk(count, largest=False).indices
