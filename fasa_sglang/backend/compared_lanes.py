"""Lanes of an eager decode batch whose tokens another selector chooses, for comparison runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fasa_sglang.backend.label_cache import LabelCache
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.ops.comparison import best_positions, selector_scores
from fasa_sglang.requests import FasaRequest


class ComparedLanes:
    """Lanes with equal requests, served together.

    Args:
        request: What all of them asked for.
        lanes: Which lanes of the batch.
        starts: Where the selectable tokens of each begin in ``slots``.
        lengths: How many there are of each.
        slots: Position to slot, lane after lane, int32.
    """

    def __init__(
        self,
        request: FasaRequest,
        lanes: list[int],
        starts: list[int],
        lengths: list[int],
        slots: torch.Tensor,
    ) -> None:
        device = slots.device
        self.request = request
        self.lanes = torch.tensor(lanes, device=device)
        self.seq_lens = torch.tensor(lengths, device=device)
        self._lengths = lengths
        positions = torch.arange(max(lengths), device=device)
        places = torch.tensor(starts, device=device)[:, None] + positions
        self.slots = slots[places.clamp(max=len(slots) - 1)].long()

    def select(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        labels: LabelCache,
        layer: int,
        sm_scale: float,
        combine: str,
    ) -> torch.Tensor:
        """The selected tokens as rows of the KV pool seen head by head.

        Args:
            q: Queries of the whole batch, ``[batch_size, HQ, D]``.
            k_cache: ``[num_slots, HKV, D]``.
            labels: This rank's.
            layer: Of ``labels``.
            sm_scale: Multiplies ``q @ k``.
            combine: How a group's query heads agree.

        Returns:
            ``slot * HKV + kv_head``, ``[lanes, HKV, N]``, int32; of a lane with fewer tokens than
            ``N``, its own come first.
        """
        q = q[self.lanes]

        def label_scores() -> torch.Tensor:
            return labels.scores(
                layer, q, self.slots, self.seq_lens, sm_scale=sm_scale, combine=combine
            )

        scores = selector_scores(
            self.request.selector,
            q,
            k_cache,
            self.slots,
            self.seq_lens,
            label_scores,
            labels.head_dims[layer],
            sm_scale=sm_scale,
            combine=combine,
            # Another draw for every layer and step, the same one in a repeated run.
            seeds=[hash((self.request.seed, layer, length)) for length in self._lengths],
        )
        # With its whole prompt attended anyway, a request has no sink among the other tokens.
        sink = 0 if self.request.prefix == "full" else self.request.sink
        positions = best_positions(
            scores,
            self.seq_lens,
            budget=self.request.budget,
            sink=sink,
            recent=self.request.recent,
        )
        num_kv_heads = k_cache.shape[1]
        slots = self.slots[:, None].expand(-1, num_kv_heads, -1).gather(-1, positions)
        heads = torch.arange(num_kv_heads, device=slots.device)[:, None]
        return (slots * num_kv_heads + heads).int()


def compared_lanes(lanes: Sequence[LaneStep], slots: torch.Tensor) -> list[ComparedLanes]:
    """Lanes that asked for another selector than FASA, grouped by what they asked for.

    Args:
        lanes: The requests of the batch, in order.
        slots: Position to slot, lane after lane, int32.
    """
    groups: dict[FasaRequest, list[tuple[int, int, int]]] = {}
    begin = 0
    for i, lane in enumerate(lanes):
        if lane.request is not None and lane.request.selector != "fasa":
            full = lane.full_prefix_len
            groups.setdefault(lane.request, []).append((i, begin + full, lane.live_len - full))
        begin += lane.seq_len
    made = []
    for request, found in groups.items():
        chosen, starts, lengths = (list(column) for column in zip(*found, strict=True))
        made.append(ComparedLanes(request, chosen, starts, lengths, slots))
    return made
