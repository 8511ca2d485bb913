"""Selectors other than FASA on the GPU, for comparison runs in eager mode.

The planner selects for all lanes of a batch. For lanes whose requests name another selector, the
classes here overwrite its choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fasa_sglang.backend.attention.label_cache import LabelCache
from fasa_sglang.backend.attention.selector_scores import selector_scores
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.requests import FasaRequest


class ComparedLanes:
    """Lanes with equal parameters, served together.

    Args:
        request: The parameters of all these lanes.
        lanes: Rows of the batch.
        starts: Start of each lane's selectable tokens in ``slots``.
        lengths: Number of selectable tokens of each lane.
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
        entries = torch.tensor(starts, device=device)[:, None] + positions
        self.slots = slots[entries.clamp(max=len(slots) - 1)].long()

    def select_into(
        self,
        indices: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        labels: LabelCache,
        layer: int,
        *,
        sm_scale: float,
        combine: str,
    ) -> None:
        """Replace FASA's selection for these lanes by that of their own selector.

        Args:
            indices: The planner's indices, ``[batch_size * HKV, max_budget]``, int32.
            q: Queries of the whole batch, ``[batch_size, HQ, D]``.
            k_cache: ``[num_slots, HKV, D]``.
            labels: Label cache of this rank.
            layer: Layer of the model.
            sm_scale: Multiplies ``q @ k``.
            combine: How a group's query heads are combined.
        """
        selected = self.select(q, k_cache, labels, layer, sm_scale=sm_scale, combine=combine)
        rows = indices.view(-1, k_cache.shape[1], indices.shape[1])
        rows[self.lanes, :, : selected.shape[-1]] = selected

    def select(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        labels: LabelCache,
        layer: int,
        *,
        sm_scale: float,
        combine: str,
    ) -> torch.Tensor:
        """The selected tokens as rows of the KV pool seen head by head; arguments as above.

        Returns:
            ``slot * HKV + kv_head``, ``[lanes, HKV, N]``, int32. In a lane with fewer than ``N``
            tokens, entries from its length on are undefined.
        """
        scores = selector_scores(
            self.request,
            labels,
            layer,
            q[self.lanes],
            k_cache,
            self.slots,
            self.seq_lens,
            self._lengths,
            sm_scale=sm_scale,
            combine=combine,
        )
        positions = best_positions(
            scores,
            self.seq_lens,
            budget=self.request.budget,
            # The sink lies inside a prompt that is attended whole.
            sink=0 if self.request.prefix == "full" else self.request.sink,
            recent=self.request.recent,
        )
        num_kv_heads = k_cache.shape[1]
        slots = self.slots[:, None].expand(-1, num_kv_heads, -1).gather(-1, positions)
        heads = torch.arange(num_kv_heads, device=slots.device)[:, None]
        return (slots * num_kv_heads + heads).int()


def best_positions(
    scores: torch.Tensor, seq_lens: torch.Tensor, *, budget: int, sink: int, recent: int
) -> torch.Tensor:
    """Select the tokens that ``reference.select_tokens`` selects, for all rows at once.

    Args:
        scores: ``[B, HKV, L]``, float32, ``-inf`` past the end.
        seq_lens: Tokens of each request, ``[B]``, int.
        budget: Tokens to select, ``sink`` and ``recent`` included.
        sink: First tokens that are always selected.
        recent: Last tokens that are always selected; the current one is even if this is 0.

    Returns:
        Positions, best first, ``[B, HKV, min(budget, L)]``, int64. Entries from a request's length
        on lie past its end.
    """
    position = torch.arange(scores.shape[-1], device=scores.device)
    ends = seq_lens[:, None, None]
    forced = (position < sink) | (position >= ends - max(1, recent))
    ranked = scores.masked_fill(forced & (position < ends), torch.inf)
    return ranked.argsort(dim=-1, descending=True, stable=True)[..., :budget]


def compared_lanes(lanes: Sequence[LaneStep], slots: torch.Tensor) -> list[ComparedLanes]:
    """Lanes whose requests name another selector than FASA, grouped by equal parameters.

    Args:
        lanes: The lanes of the batch, in order.
        slots: Position to slot, lane after lane, int32; the live slots of each lane come first.
    """
    rows_of: dict[FasaRequest, list[tuple[int, int, int]]] = {}
    begin = 0
    for i, lane in enumerate(lanes):
        if lane.request is not None and lane.request.selector != "fasa":
            prefix = lane.full_prefix_len
            rows_of.setdefault(lane.request, []).append((i, begin + prefix, lane.live_len - prefix))
        begin += lane.seq_len
    groups = []
    for request, rows in rows_of.items():
        indices, starts, lengths = (list(column) for column in zip(*rows, strict=True))
        groups.append(ComparedLanes(request, indices, starts, lengths, slots))
    return groups
