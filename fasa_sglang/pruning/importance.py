"""How often selection has chosen each generated token lately, per KV slot."""

from __future__ import annotations

import torch

# Weight of the old average. A token that is never selected loses half its average in 7 steps. With
# 0.99 the start value outweighed the selections of hundreds of steps, and the oldest tokens were
# pruned: in a simulation with SmolLM2's attention over text, the pruned tokens held 3.8 % of the
# attention mass with 0.99 and 2.7 % with 0.9.
DECAY = 0.9
# Average of a token that no step has scored yet: as if every head had always selected it.
START = 1.0


class Importance:
    """An exponential average of how often each token was selected, over layers and KV heads.

    Only entries of generated tokens of requests that prune mean anything: those of other slots hold
    what their former owners left.

    Args:
        num_slots: Slots of the KV pool, the unused first one included.
        device: Device of the averages.

    Attributes:
        average: Share of a step's (layer, KV head) pairs that selected the token, averaged over
            steps, ``[num_slots]``, float32.
        counts: Selections in the current step, ``[num_slots]``, int32.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.average = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def start(self, slots: torch.Tensor) -> None:
        """Forget what former owners left in the slots of a request. Does not synchronise.

        Args:
            slots: Slots of the tokens that the request generated before its first sparse step,
                ``[N]``, int64.
        """
        self.average.index_fill_(0, slots, START)
        self.counts.index_fill_(0, slots, 0)

    def count(self, slots: torch.Tensor) -> None:
        """Count selections.

        Args:
            slots: One entry per selection, any shape, int64.
        """
        slots = slots.flatten()
        self.counts.index_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))

    def end_step(self, slots: torch.Tensor, selectors: int) -> None:
        """Fold the counts of one request's step into its averages.

        Args:
            slots: Slots of the request's generated tokens, in order, int64. The last one belongs to
                the current token, whose average starts here.
            selectors: (layer, KV head) pairs that selected in this step.
        """
        share = self.counts[slots].float() / selectors
        self.average[slots] = DECAY * self.average[slots] + (1 - DECAY) * share
        self.average[slots[-1]] = START
        self.counts[slots] = 0
