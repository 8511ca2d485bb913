"""FASA's selection as a planner of sparse indices for FlashInfer's paged decode.

It follows FlashInfer's life cycle: construct a planner once per batch size, call ``plan()`` once
per decode step and ``run()`` once per layer. ``run()`` may be captured in a CUDA graph; ``plan()``
stays outside of the graph and rewrites buffers at fixed addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import flashinfer
import torch

from fasa_sglang.flashinfer_ext.buffers import PlannerBuffers
from fasa_sglang.flashinfer_ext.lane import Lane
from fasa_sglang.flashinfer_ext.lane_table import LaneTable
from fasa_sglang.flashinfer_ext.shrinkable_decode import SelectedDecode, ShrinkableDecode
from fasa_sglang.ops.layer_labels import LayerLabels
from fasa_sglang.ops.selection_average import update_averages
from fasa_sglang.ops.sink_logits import apply_sink_logits
from fasa_sglang.ops.token_importance import token_importance
from fasa_sglang.ops.token_selection import select_tokens
from fasa_sglang.ops.tombstones import close_gaps


class SparseIndexPlanner:
    """Selects tokens per (request, KV head) pair and attends to the selected ones.

    Args:
        float_workspace_buffer: FlashInfer's float workspace, uint8. Planners that do not run at
            the same time may share it.
        batch_size: Lanes of the batch, padding included.
        num_qo_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: Dims of a head: 64, 128 or 256.
        dtype: Dtype of queries and KV cache, float16 or bfloat16.
        paged_kv_indices_buffer: Slot of every token, lane after lane, int32. The planner keeps
            this tensor; the caller writes the coming step's slots into it before ``plan()``, which
            may move entries where lanes have pruned tokens.
        buffers: Scratch for batches of at least ``batch_size`` lanes.

    Attributes:
        mixed: Whether the planned step has lanes that do more than select; such a step runs a
            dense pass beside the sparse one and merges both.
        indices: ``slot * num_kv_heads + kv_head`` of the tokens that the last ``select()`` chose,
            ``[batch_size * num_kv_heads, max_budget]``, int32.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        *,
        batch_size: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        paged_kv_indices_buffer: torch.Tensor,
        buffers: PlannerBuffers,
    ) -> None:
        device = float_workspace_buffer.device
        self._num_kv_heads = num_kv_heads
        self._slots, self._buffers = paged_kv_indices_buffer, buffers
        max_budget = buffers.indices.shape[1]
        self._table = table = LaneTable(batch_size, num_kv_heads, max_budget, device)
        heads = (num_qo_heads, num_kv_heads, head_dim)
        common = (*heads, dtype, float_workspace_buffer)
        self.indices = buffers.indices[: batch_size * num_kv_heads]
        self._selected = SelectedDecode(self.indices, table.selected_last_page_len, *common)
        self._prefix = ShrinkableDecode(
            table.indptr, self._slots, table.prefix_last_page_len, *common
        )
        self._live = ShrinkableDecode(table.indptr, self._slots, table.live_last_page_len, *common)
        self.mixed = False

    def plan(
        self, lanes: Sequence[Lane], kv_lens: Sequence[int], *, mixed: bool | None = None
    ) -> None:
        """Prepare a decode step; call it before the first ``run()`` and outside CUDA graphs.

        Args:
            lanes: The requests of the batch. Missing ones at the end are padding, which is dense.
            kv_lens: Tokens of every lane, pruned ones included, ``[batch_size]``.
            mixed: Whether to run the dense pass; must be True if a lane, padding aside, is not
                ``Lane.selects_only``. None decides by the lanes. A captured ``run()`` repeats what
                was planned when it was captured.
        """
        self.mixed = not all(lane.selects_only for lane in lanes) if mixed is None else mixed
        self._table.fill(lanes, kv_lens)
        if any(lane.pruned for lane in lanes):
            close_gaps(self._slots, self._table.indptr, self._table.pruned)
        self._selected.plan(self._table.selected_lens.repeat(self._num_kv_heads))
        if self.mixed:
            self._prefix.plan(self._table.prefix_lens)
            self._live.plan(self._table.live_host_lens)

    def run(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        labels: LayerLabels,
        *,
        sm_scale: float,
        selection_counts: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer's decode attention: ``select()``, then ``attend()``.

        Args:
            q: Queries after RoPE, ``[batch_size, num_qo_heads, head_dim]``, contiguous.
            kv_cache: Keys and values, ``[num_slots, num_kv_heads, head_dim]`` each, contiguous.
            labels: The layer's labels.
            sm_scale: Multiplies ``q @ k``.
            selection_counts: See ``select()``.
            sink_logits: Attention sinks, ``[num_qo_heads]``: one more logit per query head in the
                softmax, without a value. They do not change what is selected.

        Returns:
            Shape and dtype of ``q``.

        Reference: :func:`fasa_sglang.ops.reference.fasa_decode`.
        """
        self.select(q, labels, sm_scale=sm_scale, selection_counts=selection_counts)
        return self.attend(q, kv_cache, sm_scale=sm_scale, sink_logits=sink_logits)

    def select(
        self,
        q: torch.Tensor,
        labels: LayerLabels,
        *,
        sm_scale: float,
        selection_counts: torch.Tensor | None = None,
    ) -> None:
        """Score all tokens and write the best ones into ``indices``.

        Args:
            q: As in ``run()``.
            labels: The layer's labels.
            sm_scale: Multiplies ``q @ k``.
            selection_counts: Incremented for every selection of a slot by a lane that counts,
                ``[num_slots]``, int32.
        """
        table = self._table
        ranges = (self._slots, table.starts, table.selectable_lens)
        forced = (table.sinks, table.recents)
        token_importance(q, labels, *ranges, *forced, self._buffers.scores, sm_scale=sm_scale)
        select_tokens(
            self._buffers.scores,
            *ranges,
            table.budgets,
            *forced,
            self._buffers.selection,
            self.indices,
            self._num_kv_heads,
            selection_counts,
            table.counted,
        )

    def attend(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        sm_scale: float,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the tokens in ``indices`` and to dense lanes and prefixes; see ``run()``."""
        out = torch.empty_like(q)
        if not self.mixed and sink_logits is None:
            self._selected.run(q, *kv_cache, out, sm_scale)
            return out
        lse, prefix_lse = (part[: len(q)] for part in self._buffers.lse)
        self._selected.run(q, *kv_cache, out, sm_scale, lse)
        if self.mixed:
            prefix_out = self._buffers.out[: len(q)]
            self._prefix.run(q, *kv_cache, prefix_out, sm_scale, prefix_lse)
            # The two passes read disjoint tokens. FlashInfer gives a pass over no token a
            # log-sum-exp so low that its weight is 0.
            flashinfer.merge_state_in_place(out, lse, prefix_out, prefix_lse)
        if sink_logits is not None:
            apply_sink_logits(out, lse, sink_logits)
        return out

    def run_dense(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        sm_scale: float,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A layer of a mixed step that attends to every live token; see ``run()``."""
        out = torch.empty_like(q)
        if sink_logits is None:
            self._live.run(q, *kv_cache, out, sm_scale)
            return out
        lse = self._buffers.lse[0, : len(q)]
        self._live.run(q, *kv_cache, out, sm_scale, lse)
        apply_sink_logits(out, lse, sink_logits)
        return out

    def update_averages(
        self,
        selection_counts: torch.Tensor,
        average: torch.Tensor,
        num_selecting: int,
        decay: float,
    ) -> None:
        """Fold a step's counts into running averages, after its last layer.

        Args:
            selection_counts: As given to ``select()``; the counting lanes' entries are reset to 0.
            average: Share of (layer, KV head) pairs that select a slot, averaged over steps,
                ``[num_slots]``, float32.
            num_selecting: (layer, KV head) pairs that counted in this step.
            decay: Weight of the old average.

        Reference: :meth:`fasa_sglang.pruning.importance.Importance.end_step`.
        """
        table = self._table
        update_averages(
            self._slots,
            table.indptr,
            table.counts_from,
            table.live_lens,
            table.counted,
            selection_counts,
            average,
            num_selecting,
            decay,
        )
