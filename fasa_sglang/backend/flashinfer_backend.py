"""FASA on the GPU: SGLang's FlashInfer backend plus selection, eager or in CUDA graphs.

Prefill, dense decode and the writing of keys are SGLang's own code. In a sparse step SGLang's
``forward_decode`` is given another decode wrapper, which selects and then attends.

Under CUDA graphs every batch size is captured once per ``Variant``, and a batch replays the
cheapest one that covers it, so that a batch without FASA pays for writing labels and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

from fasa_sglang.backend.base import FasaBackend, Variant
from fasa_sglang.backend.compared_lanes import ComparedLanes, compared_lanes
from fasa_sglang.backend.lane_table import LaneTable
from fasa_sglang.backend.scratch import Scratch
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.flashinfer_ext.attention import (
    FocusedAttention,
    ShrinkableDecode,
    merge_attention,
)
from fasa_sglang.memory.importance import DECAY
from fasa_sglang.ops.selection_average import update_averages
from fasa_sglang.ops.token_importance import token_importance
from fasa_sglang.ops.token_selection import select_tokens
from fasa_sglang.ops.tombstones import close_gaps

logger = logging.getLogger(__name__)


class FasaFlashInferAttnBackend(FasaBackend, FlashInferAttnBackend):
    """Dense prefill, sparse decode for the lanes that ask for it.

    Args:
        runner: SGLang's ``ModelRunner``, its KV pool allocated.
        config: The server's settings; ``calibration`` must be set.

    Raises:
        FasaError: The calibration is missing, broken or of another model.
    """

    forward_metadata: Any

    def __init__(self, runner: Any, config: FasaConfig) -> None:
        super().__init__(runner, init_new_workspace=runner.init_new_workspace)
        self.start_fasa(runner, config)
        self.dtype = runner.dtype
        self.num_qo_heads = self.indices_updater_decode.num_qo_heads
        self.num_kv_heads, self.head_dim = self.token_to_kv_pool.k_buffer[0].shape[1:]
        self.longest = min(self.max_context_len, self.token_to_kv_pool.size)
        self.variants = tuple(Variant)
        self._graph_scratch: Scratch | None = None
        self._graph_decodes: dict[int, SparseDecode] = {}
        self._eager_scratch: Scratch | None = None
        self._eager_decodes: dict[int, SparseDecode] = {}

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Make the buffers that captured kernels use."""
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args)
        self._graph_scratch = self._new_scratch(max_bs, self.longest)
        logger.info(
            "FASA: %.0f MiB of scratch for batches of %d up to %d tokens",
            self._graph_scratch.nbytes / 2**20,
            max_bs,
            self.longest,
        )

    def _prepare_cuda_graph_metadata(
        self, bs: int, num_tokens: int, forward_mode: Any, spec_info: Any
    ) -> None:
        wrappers = self.decode_cuda_graph_metadata.get(bs)
        super()._prepare_cuda_graph_metadata(bs, num_tokens, forward_mode, spec_info)
        if wrappers is not None and forward_mode.is_decode_or_idle():
            # Another variant of a captured size. The earlier graph reads the plan of its own
            # wrappers, so every variant has to be planned through the same ones.
            self.decode_cuda_graph_metadata[bs] = wrappers
            self.forward_metadata.decode_wrappers = wrappers

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare a captured or replayed forward pass; runs before the graph."""
        decoding = forward_batch.forward_mode.is_decode_or_idle()
        self.variant = Variant.DENSE
        if decoding:
            self.variant = self.capturing or self._needed()
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if decoding and not in_capture:
            self.memory.rows_were_read()
        if self.variant is Variant.DENSE:
            return
        batch_size = forward_batch.batch_size
        decode = self._graph_decodes.get(batch_size)
        if decode is None:
            assert in_capture and self._graph_scratch is not None
            slots = self.cuda_graph_kv_indices[0]
            decode = SparseDecode(self, batch_size, slots, self._graph_scratch)
            self._graph_decodes[batch_size] = decode
        self._start(decode, forward_batch, [] if in_capture else self.lanes)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare an eager forward pass."""
        super().init_forward_metadata(forward_batch)
        decoding = forward_batch.forward_mode.is_decode_or_idle()
        if decoding:
            self.memory.rows_were_read()
        self.variant = self._needed() if decoding else Variant.DENSE
        if self.variant is Variant.DENSE:
            return
        batch_size = forward_batch.batch_size
        decode = self._eager_decode(batch_size, int(forward_batch.seq_lens_cpu.max()))
        # SGLang makes a new tensor for every eager step; plans want one that stays.
        slots = self.decode_wrappers[0]._paged_kv_indices_buf
        decode.slots[: len(slots)].copy_(slots)
        self._start(decode, forward_batch, self.lanes)

    def _eager_decode(self, batch_size: int, longest: int) -> SparseDecode:
        """Buffers and plans for a batch size, made at its first use or when they are outgrown."""
        scratch = self._eager_scratch
        if scratch is None or scratch.batch_size < batch_size or scratch.longest < longest:
            # Twice as much as needed, so that a growing batch does not allocate at every step. With
            # pruned tokens a request may be longer than the pool.
            more = max(2 * longest, scratch.longest if scratch else 0)
            longest = max(longest, min(self.longest, more))
            lanes = max(2 * batch_size, scratch.batch_size if scratch else 0)
            scratch = self._eager_scratch = self._new_scratch(lanes, longest)
            room = lanes * longest
            self._eager_slots = torch.zeros(room, dtype=torch.int32, device=scratch.out.device)
            self._eager_decodes.clear()
        if batch_size not in self._eager_decodes:
            self._eager_decodes[batch_size] = SparseDecode(
                self, batch_size, self._eager_slots, scratch
            )
        return self._eager_decodes[batch_size]

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """SGLang's decode, with selection where the step and the layer want it."""
        dense = self.forward_metadata
        selects = not self.is_dense(layer)
        if self.variant is Variant.MIXED or (self.variant is Variant.SPARSE and selects):
            self._decode.layer, self._decode.selects = layer.layer_id - self.first_layer, selects
            self.forward_metadata = dataclasses.replace(dense, decode_wrappers=[self._decode])
        try:
            out = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        finally:
            self.forward_metadata = dense
        self.write_labels(layer, forward_batch)
        if layer.layer_id == self.last_layer and self.variant is not Variant.DENSE:
            self._decode.end_step()
        return out

    def _needed(self) -> Variant:
        """The cheapest variant that does what the coming batch asks for."""
        sparse = [lane for lane in self.lanes if lane.request is not None]
        if not sparse:
            return Variant.DENSE
        # SGLang's own wrapper, which serves the dense layers of the others, knows no gaps.
        more = any(lane.full_prefix_len or lane.pruned for lane in sparse)
        alone = len(sparse) == len(self.lanes) and not more
        return Variant.SPARSE if alone else Variant.MIXED

    def _start(self, decode: SparseDecode, forward_batch: Any, lanes: list[Any]) -> None:
        decode.start(lanes, forward_batch.seq_lens_cpu.tolist(), self.variant)
        self._decode = decode

    def _new_scratch(self, batch_size: int, longest: int) -> Scratch:
        return Scratch(
            batch_size,
            longest,
            self.num_qo_heads,
            self.num_kv_heads,
            self.head_dim,
            self.config,
            self.dtype,
            self.workspace_buffer.device,
        )


class SparseDecode:
    """Stands in for FlashInfer's decode wrapper: selects, then attends to what was selected.

    Args:
        backend: Whose labels and workspace are used.
        batch_size: Lanes of the batch, padding included.
        slots: Position to slot, lane after lane, as SGLang filled them for its dense decode, int32.
        scratch: At least as large as the batch.
    """

    def __init__(
        self,
        backend: FasaFlashInferAttnBackend,
        batch_size: int,
        slots: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        heads = (backend.num_qo_heads, backend.num_kv_heads, backend.head_dim)
        rest = (backend.dtype, backend.workspace_buffer)
        rows = batch_size * backend.num_kv_heads
        device = backend.workspace_buffer.device
        self.labels = backend.label_cache
        self.importance = backend.memory.importance
        self.num_selectors = backend.num_selectors
        self.num_kv_heads = backend.num_kv_heads
        self.slots, self.scratch = slots, scratch
        self.table = LaneTable(batch_size, backend.num_kv_heads, backend.config.max_budget, device)
        self.focused = FocusedAttention(
            scratch.indices[:rows], self.table.focused_last_page_len, *heads, *rest
        )
        self.dense = ShrinkableDecode(
            self.table.indptr, slots, self.table.dense_last_page_len, *heads, *rest
        )
        self.everything = ShrinkableDecode(
            self.table.indptr, slots, self.table.live_last_page_len, *heads, *rest
        )
        self.batch_size = batch_size
        self.variant = Variant.SPARSE
        self.layer, self.selects = 0, True
        self.compared: list[ComparedLanes] = []
        self._combine = backend.config.combine

    def start(self, lanes: list[Any], seq_lens: list[int], variant: Variant) -> None:
        """Tell the device what the coming step does; arguments as ``LaneTable.fill``."""
        self.variant = variant
        self.table.fill(lanes, seq_lens)
        if any(lane.pruned for lane in lanes):
            close_gaps(self.slots, self.table.indptr, self.table.pruned)
        self.compared = compared_lanes(lanes, self.slots)
        self.focused.plan(self.table.focused_lengths.repeat(self.num_kv_heads))
        if variant is Variant.MIXED:
            self.dense.plan(self.table.dense_lengths)
            self.everything.plan(self.table.live_lengths)

    def forward(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        sm_scale: float,
        logits_soft_cap: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> torch.Tensor:
        """One layer's decode, called like FlashInfer's wrapper.

        Args:
            q: ``[batch_size, num_qo_heads, head_dim]``, contiguous.
            kv_cache: Keys and values, ``[num_slots, num_kv_heads, head_dim]`` each.
            sm_scale: Multiplies ``q @ k``.
            logits_soft_cap: Has to be 0 or None.
            k_scale: Ignored: pools of scaled keys are refused at start.
            v_scale: Likewise.

        Raises:
            UnsupportedHostError: The layer caps its logits, or a kernel does not start.
        """
        if logits_soft_cap:
            raise UnsupportedHostError(
                f"FASA ranks tokens by plain logits, layer {self.layer} caps them at "
                f"{logits_soft_cap}; serve this model with another attention backend"
            )
        stage = "dense attention"
        try:
            if not self.selects:
                return self._attend_to_all(q, *kv_cache, sm_scale)
            stage = "token importance"
            self._score(q, sm_scale)
            stage = "token selection"
            self._select()
            for group in self.compared:
                self._select_compared(group, q, kv_cache[0], sm_scale)
            stage = "focused attention"
            return self._attend(q, *kv_cache, sm_scale)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UnsupportedHostError(
                f"FASA's {stage} failed in layer {self.layer} for queries {tuple(q.shape)} of "
                f"{q.dtype}, labels {tuple(self.labels.labels.shape[1:])} of "
                f"{self.labels.labels.dtype} and {self.scratch.indices.shape[1]} indices per KV "
                f"head: {error}"
            ) from error

    def end_step(self) -> None:
        """Fold what the layers selected into the averages of the lanes that prune."""
        if not self.num_selectors:
            return
        table = self.table
        update_averages(
            self.slots,
            table.indptr,
            table.prompt_lens,
            table.live_lens,
            table.counted,
            self.importance.counts,
            self.importance.average,
            self.num_selectors,
            DECAY,
        )

    def _score(self, q: torch.Tensor, sm_scale: float) -> None:
        table = self.table
        token_importance(
            q,
            self.labels.labels[self.layer],
            self.labels.dims[self.layer],
            self.labels.scale[self.layer],
            self.slots,
            table.starts,
            table.seq_lens,
            table.sinks,
            table.recents,
            self.scratch.scores,
            sm_scale=sm_scale,
        )

    def _select(self) -> None:
        table = self.table
        select_tokens(
            self.scratch.scores,
            self.slots,
            table.starts,
            table.seq_lens,
            table.budgets,
            table.sinks,
            table.recents,
            self.scratch.selection,
            self.focused.indices,
            self.num_kv_heads,
            self.importance.counts,
            table.counted,
        )

    def _select_compared(
        self, group: ComparedLanes, q: torch.Tensor, k_cache: torch.Tensor, sm_scale: float
    ) -> None:
        """Replace what FASA selected in lanes that asked for another selector."""
        rows = self.focused.indices.view(-1, self.num_kv_heads, self.focused.indices.shape[1])
        chosen = group.select(q, k_cache, self.labels, self.layer, sm_scale, self._combine)
        rows[group.lanes, :, : chosen.shape[-1]] = chosen

    def _attend_to_all(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        """A dense layer of a mixed step."""
        out = torch.empty_like(q)
        self.everything.run(q, k_cache, v_cache, out, sm_scale)
        return out

    def _attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        if self.variant is Variant.SPARSE:
            self.focused.run(q, k_cache, v_cache, out, sm_scale)
            return out
        lse, other_lse = (part[: len(q)] for part in self.scratch.lse)
        other = self.scratch.out[: len(q)]
        self.focused.run(q, k_cache, v_cache, out, sm_scale, lse)
        self.dense.run(q, k_cache, v_cache, other, sm_scale, other_lse)
        merge_attention(out, lse, other, other_lse)
        return out
