"""The loss of a batch, and how much of its replies a model would generate."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fasa_sglang.workloads.eval.worksheet.batches import IGNORED, Batch

# Positions whose logits are in memory at a time.
CHUNK = 4096


def batch_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of the replies' tokens, in nats.

    Args:
        model: A causal language model of transformers.
        batch: On the model's device.
    """
    hidden, targets = _reply_states(model, batch)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_sum_loss, model.lm_head, part, target, use_reentrant=False)
    return total / len(targets)


@torch.no_grad()
def right_tokens(model: Any, batch: Batch) -> torch.Tensor:
    """Where the best next token is the target, given all right tokens before it.

    Returns:
        Bool ``[B, L]``; True where there is no target.
    """
    hidden, targets = _reply_states(model, batch)
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    right = torch.ones_like(batch.targets, dtype=torch.bool)
    right[batch.targets != IGNORED] = torch.cat(
        [model.lm_head(part).argmax(dim=-1) == target for part, target in parts]
    )
    return right


def _reply_states(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    # Without an attention mask, attention is causal and runs in torch's fastest kernel.
    hidden = model.model(batch.ids, use_cache=False).last_hidden_state
    chosen = batch.targets != IGNORED
    return hidden[chosen], batch.targets[chosen]


def _sum_loss(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
