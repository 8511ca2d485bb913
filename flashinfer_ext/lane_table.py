"""The numbers per lane that the kernels of a sparse step read, at fixed addresses on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fasa_sglang.flashinfer_ext.lane import Lane

# Fields that hold one number per lane.
FIELDS = (
    "starts",
    "selectable_lens",
    "budgets",
    "sinks",
    "recents",
    "prefix_last_page_len",
    "live_last_page_len",
    "live_lens",
    "counts_from",
    "pruned",
    "counted",
)


class LaneTable:
    """One row of numbers per lane, filled on the host and sent to the device in one copy.

    A lane's tokens are divided into a prefix that it attends to densely and the tokens that it
    selects from. A dense lane consists of prefix only; a sparse lane has a prefix only if
    ``Lane.dense_prefix`` is set. Pruned tokens belong to neither, and the slots of a lane's live
    tokens come first.

    ``*_last_page_len`` fields are lengths in the form that ``ShrinkableDecode`` reads.

    Args:
        batch_size: Lanes of the batch, padding included.
        num_kv_heads: KV heads of this rank.
        max_budget: Columns of the index buffer, per (lane, KV head).
        device: Where the kernels run.

    Attributes:
        starts: Start of each lane's selectable tokens in the slots of the batch.
        selectable_lens: Number of tokens to select from.
        budgets: Number of tokens to select, sinks and recents included.
        sinks: Number of first selectable tokens that are always selected.
        recents: Number of last selectable tokens that are always selected.
        prefix_last_page_len: Number of tokens that are attended densely.
        live_last_page_len: Number of tokens that have a slot.
        live_lens: Number of tokens that have a slot, as a plain number.
        counts_from: First position whose selections are counted.
        pruned: Number of tokens whose slots were freed.
        counted: 1 if the lane's selections are counted, else 0.
        selected_last_page_len: Number of selected tokens, ``[batch_size * num_kv_heads]``.
        indptr: Start of each lane's slots, ``[batch_size + 1]``.
        prefix_lens, selected_lens, live_host_lens: Lengths of the two passes and of a dense layer,
            ``[batch_size]``, numpy arrays on the host; set by ``fill``.

        All others are int32 tensors on the device, ``[batch_size]`` unless stated otherwise.
    """

    starts: torch.Tensor
    selectable_lens: torch.Tensor
    budgets: torch.Tensor
    sinks: torch.Tensor
    recents: torch.Tensor
    prefix_last_page_len: torch.Tensor
    live_last_page_len: torch.Tensor
    live_lens: torch.Tensor
    counts_from: torch.Tensor
    pruned: torch.Tensor
    counted: torch.Tensor
    selected_last_page_len: torch.Tensor
    indptr: torch.Tensor

    def __init__(
        self, batch_size: int, num_kv_heads: int, max_budget: int, device: torch.device
    ) -> None:
        self._num_kv_heads = num_kv_heads
        self._max_budget = max_budget
        self._sizes = dict.fromkeys(FIELDS, batch_size)
        self._sizes.update(selected_last_page_len=batch_size * num_kv_heads, indptr=batch_size + 1)
        size = sum(_aligned(size) for size in self._sizes.values())
        self._table = torch.zeros(size, dtype=torch.int32, device=device)
        for name, part in self._parts(self._table).items():
            setattr(self, name, part)

    def fill(self, lanes: Sequence[Lane], kv_lens: Sequence[int]) -> None:
        """Describe the coming step.

        Args:
            lanes: The requests of the batch. Missing ones at the end are padding, which is dense.
            kv_lens: Tokens of every lane, pruned ones included, ``[batch_size]``.
        """
        host = torch.empty(
            self._table.shape, dtype=torch.int32, device="cpu", pin_memory=self._table.is_cuda
        )
        part = {name: tensor.numpy() for name, tensor in self._parts(host).items()}
        lengths = np.asarray(kv_lens, dtype=np.int32)
        part["indptr"][0] = 0
        np.cumsum(lengths, out=part["indptr"][1:])
        prefix = lengths.copy()
        for name in ("budgets", "sinks", "recents", "counts_from", "pruned", "counted"):
            part[name][:] = 0
        for i, lane in enumerate(lanes):
            if lane.budget is None:
                continue
            prefix[i] = lane.dense_prefix
            part["budgets"][i] = lane.budget
            # A dense prefix replaces the sink.
            part["sinks"][i] = 0 if lane.dense_prefix else lane.sink
            part["recents"][i] = lane.recent
            part["pruned"][i] = lane.pruned
            if lane.counts_from is not None:
                part["counted"][i], part["counts_from"][i] = 1, lane.counts_from
        live = lengths - part["pruned"]
        selectable = live - prefix
        selected = np.minimum(part["budgets"], selectable)
        part["starts"][:] = part["indptr"][:-1] + prefix
        part["selectable_lens"][:] = selectable
        part["prefix_last_page_len"][:] = prefix - lengths + 1
        part["live_last_page_len"][:] = live - lengths + 1
        part["live_lens"][:] = live
        part["selected_last_page_len"][:] = (
            np.repeat(selected, self._num_kv_heads) - self._max_budget + 1
        )
        self.prefix_lens, self.selected_lens, self.live_host_lens = prefix, selected, live
        self._table.copy_(host, non_blocking=True)

    def _parts(self, table: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = table.split([_aligned(size) for size in self._sizes.values()])
        return {
            name: piece[:size]
            for (name, size), piece in zip(self._sizes.items(), pieces, strict=True)
        }


def _aligned(size: int) -> int:
    """``size`` int32 numbers rounded up to 16 bytes: Triton specialises on alignment."""
    return -(-size // 4) * 4
