"""The per-lane numbers that the kernels of a sparse step read, at fixed places on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fasa_sglang.backend.step import LaneStep

# Fields of one number per lane.
FIELDS = (
    "starts",
    "seq_lens",
    "budgets",
    "sinks",
    "recents",
    "dense_last_page_len",
    "live_last_page_len",
    "live_lens",
    "prompt_lens",
    "pruned",
    "counted",
)


class LaneTable:
    """One row of numbers per lane, filled on the host and sent in one copy.

    A lane's tokens are split into those it attends to densely, from the first on, and those it
    selects from. A dense lane selects from none; a sparse lane attends densely to its prompt if
    its request says so, else to nothing. Pruned tokens are neither, and what is left of a lane lies
    at the front of its slots.

    Args:
        batch_size: Lanes of the batch, padding included.
        num_kv_heads: KV heads of this rank.
        max_budget: Room for indices per (lane, KV head).
        device: Where the kernels run.

    Attributes:
        starts: Where the selectable tokens of each lane begin among the slots of the batch.
        seq_lens: Tokens to select from.
        budgets: Tokens to select, sinks and recents among them.
        sinks: First ones that are always selected.
        recents: Last ones that are always selected.
        dense_last_page_len: Densely attended tokens, as ``ShrinkableDecode`` reads them.
        live_last_page_len: All tokens that were not pruned, likewise.
        live_lens: The same as plain numbers.
        prompt_lens: First tokens that are never pruned.
        pruned: Tokens that were.
        counted: Whether the lane's selections are counted, 0 or 1.
        focused_last_page_len: Selected tokens of every (lane, KV head), likewise.
        indptr: Where the slots of each lane begin, ``[batch_size + 1]``.
        All int32; ``[batch_size]`` unless said otherwise.
    """

    def __init__(
        self, batch_size: int, num_kv_heads: int, max_budget: int, device: torch.device
    ) -> None:
        self._num_kv_heads = num_kv_heads
        self._max_budget = max_budget
        self._sizes = dict.fromkeys(FIELDS, batch_size)
        self._sizes.update(focused_last_page_len=batch_size * num_kv_heads, indptr=batch_size + 1)
        room = sum(_aligned(size) for size in self._sizes.values())
        self._table = torch.zeros(room, dtype=torch.int32, device=device)
        for name, part in self._parts(self._table).items():
            setattr(self, name, part)

    starts: torch.Tensor
    seq_lens: torch.Tensor
    budgets: torch.Tensor
    sinks: torch.Tensor
    recents: torch.Tensor
    dense_last_page_len: torch.Tensor
    live_last_page_len: torch.Tensor
    live_lens: torch.Tensor
    prompt_lens: torch.Tensor
    pruned: torch.Tensor
    counted: torch.Tensor
    focused_last_page_len: torch.Tensor
    indptr: torch.Tensor

    def fill(self, lanes: Sequence[LaneStep], seq_lens: Sequence[int]) -> None:
        """Describe the coming step.

        Args:
            lanes: The requests of the batch; missing ones at the end are padding, which is dense.
            seq_lens: Tokens of every lane, ``[batch_size]``.

        Attributes ``dense_lengths``, ``focused_lengths`` and ``live_lengths`` then hold, on the
        host, the tokens of every lane that the two passes and a dense layer read.
        """
        host = torch.empty(self._table.shape, dtype=torch.int32, pin_memory=self._table.is_cuda)
        part = {name: tensor.numpy() for name, tensor in self._parts(host).items()}
        lengths = np.asarray(seq_lens, dtype=np.int32)
        part["indptr"][0] = 0
        np.cumsum(lengths, out=part["indptr"][1:])
        # Tokens of each lane that come before the ones it selects from.
        dense = lengths.copy()
        for name in ("budgets", "sinks", "recents", "prompt_lens", "pruned", "counted"):
            part[name][:] = 0
        for i, lane in enumerate(lanes):
            if lane.request is None:
                continue
            part["prompt_lens"][i] = lane.prompt_len
            part["pruned"][i] = lane.pruned
            part["counted"][i] = lane.prunes
            dense[i] = lane.full_prefix_len
            part["budgets"][i] = lane.request.budget
            part["sinks"][i] = 0 if lane.full_prefix_len else lane.request.sink
            part["recents"][i] = lane.recent
        live = lengths - part["pruned"]
        selectable = live - dense
        focused = np.minimum(part["budgets"], selectable)
        part["starts"][:] = part["indptr"][:-1] + dense
        part["seq_lens"][:] = selectable
        part["dense_last_page_len"][:] = dense - lengths + 1
        part["live_last_page_len"][:] = live - lengths + 1
        part["live_lens"][:] = live
        part["focused_last_page_len"][:] = (
            np.repeat(focused, self._num_kv_heads) - self._max_budget + 1
        )
        self.dense_lengths, self.focused_lengths, self.live_lengths = dense, focused, live
        self._table.copy_(host, non_blocking=True)

    def _parts(self, table: torch.Tensor) -> dict[str, torch.Tensor]:
        rooms = table.split([_aligned(size) for size in self._sizes.values()])
        return {
            name: room[:size] for (name, size), room in zip(self._sizes.items(), rooms, strict=True)
        }


def _aligned(size: int) -> int:
    """Numbers up to the next 16 bytes: Triton compiles anew for every other alignment."""
    return -(-size // 4) * 4
