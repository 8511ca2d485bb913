"""FASA on the GPU: SGLang's FlashInfer backend plus token selection, eager or in CUDA graphs.

Prefill, dense decode and key writes are SGLang's own code. In a sparse step, SGLang's
``forward_decode`` gets a ``SparseDecode`` as its decode wrapper, which selects and then attends.

Under CUDA graphs every batch size is captured once per ``Variant``. A batch replays the cheapest
variant that covers it, so a batch without FASA only pays for writing labels.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

from fasa_sglang.backend.attention.base import FasaBackend
from fasa_sglang.backend.attention.sparse_decode import SparseDecode
from fasa_sglang.backend.attention.variant import Variant
from fasa_sglang.backend.attention.window_slots import WindowSlots
from fasa_sglang.backend.host import SUPPORTED_VERSIONS, full_attention_pool
from fasa_sglang.backend.served_model import served_model
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.flashinfer_ext.buffers import PlannerBuffers
from fasa_sglang.flashinfer_ext.planner import SparseIndexPlanner
from fasa_sglang.flashinfer_ext.self_test import decode_problem
from fasa_sglang.flashinfer_ext.sink_wrapper import SinkWrapper
from fasa_sglang.layer_plan import LayerKind

logger = logging.getLogger(__name__)


class FasaFlashInferAttnBackend(FasaBackend, FlashInferAttnBackend):
    """Dense prefill; sparse decode for the lanes that use FASA.

    Args:
        runner: SGLang's ``ModelRunner``, its KV pool allocated.
        config: The server's settings.

    Raises:
        UnsupportedHostError: FlashInfer does not pass the self-test.
    """

    forward_metadata: Any
    has_variants = True

    def __init__(self, runner: Any, config: FasaConfig) -> None:
        super().__init__(runner, init_new_workspace=runner.init_new_workspace)
        self.start_fasa(runner, config)
        self.dtype = runner.dtype
        self.num_qo_heads = self.indices_updater_decode.num_qo_heads
        pool = full_attention_pool(self.token_to_kv_pool)
        self.num_kv_heads, self.head_dim = pool.k_buffer[0].shape[1:]
        self.max_kv_len = min(self.max_context_len, pool.size)
        has_sink_logits = served_model(runner.model_config).has_sink_logits
        if has_sink_logits or runner.sliding_window_size is not None:
            # SGLang's other way to prefill has no log-sum-exp over all tokens, and ignores sliding
            # windows in prompts without a cached prefix.
            self.use_paged = True
        problem = decode_problem(
            self.num_qo_heads // self.num_kv_heads,
            self.head_dim,
            self.dtype,
            self.workspace_buffer,
        )
        if problem is not None:
            raise UnsupportedHostError(
                f"{problem}; install the FlashInfer version that {SUPPORTED_VERSIONS} requires, or "
                "use another attention backend"
            )
        # With sliding windows in some layers SGLang has two wrappers, the first one for windows.
        self._full_wrapper = len(self.decode_wrappers) - 1
        self._window_slots = WindowSlots(self)
        self._graph_buffers: PlannerBuffers | None = None
        self._graph_decodes: dict[int, SparseDecode] = {}
        self._eager_buffers: PlannerBuffers | None = None
        self._eager_decodes: dict[int, SparseDecode] = {}

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate the buffers that captured kernels use."""
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args)
        self._graph_buffers = self._new_buffers(max_bs, self.max_kv_len)
        logger.info(
            "FASA: %.0f MiB of scratch for %d requests of up to %d tokens",
            self._graph_buffers.nbytes / 2**20,
            max_bs,
            self.max_kv_len,
        )

    def _prepare_cuda_graph_metadata(
        self, bs: int, num_tokens: int, forward_mode: Any, spec_info: Any
    ) -> None:
        wrappers = self.decode_cuda_graph_metadata.get(bs)
        super()._prepare_cuda_graph_metadata(bs, num_tokens, forward_mode, spec_info)
        if wrappers is not None and forward_mode.is_decode_or_idle():
            # Another variant of this batch size has been captured, and its graph reads the plan of
            # these wrappers. All variants of a size therefore share one set of wrappers.
            self.decode_cuda_graph_metadata[bs] = wrappers
            self.forward_metadata.decode_wrappers = wrappers

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare a forward pass that is captured or replayed; runs outside the graph."""
        decoding = forward_batch.forward_mode.is_decode_or_idle()
        self.variant = Variant.DENSE
        if decoding:
            self.variant = self.capturing or self._needed()
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if decoding:
            wrappers = self.decode_cuda_graph_metadata[forward_batch.batch_size]
            self._window_slots.translate(wrappers[0], forward_batch)
            if not in_capture:
                self.pruner.rows_were_read()
        if self.variant is Variant.DENSE:
            return
        batch_size = forward_batch.batch_size
        decode = self._graph_decodes.get(batch_size)
        if decode is None:
            assert in_capture and self._graph_buffers is not None
            slots = self.cuda_graph_kv_indices[self._full_wrapper]
            decode = self._new_decode(batch_size, slots, self._graph_buffers)
            self._graph_decodes[batch_size] = decode
        self._start(decode, forward_batch, [] if in_capture else self.lanes)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare an eager forward pass."""
        super().init_forward_metadata(forward_batch)
        decoding = forward_batch.forward_mode.is_decode_or_idle()
        if decoding:
            self._window_slots.translate(self.decode_wrappers[0], forward_batch)
            self.pruner.rows_were_read()
        self.variant = self._needed() if decoding else Variant.DENSE
        if self.variant is Variant.DENSE:
            return
        batch_size = forward_batch.batch_size
        decode = self._eager_decode(batch_size, int(forward_batch.seq_lens_cpu.max()))
        # SGLang allocates a new index tensor for every eager step; the planner needs a fixed one.
        slots = self.decode_wrappers[self._full_wrapper]._paged_kv_indices_buf
        decode.slots[: len(slots)].copy_(slots)
        self._start(decode, forward_batch, self.lanes)

    def _eager_decode(self, batch_size: int, max_len: int) -> SparseDecode:
        """The eager sparse decode of a batch size, reallocated when it is too small."""
        buffers = self._eager_buffers
        if buffers is None or buffers.max_batch_size < batch_size or buffers.max_kv_len < max_len:
            # Twice as large as needed, so that a growing batch does not reallocate at every step.
            # A request with pruned tokens may be longer than the pool.
            doubled = max(2 * max_len, buffers.max_kv_len if buffers else 0)
            max_len = max(max_len, min(self.max_kv_len, doubled))
            lanes = max(2 * batch_size, buffers.max_batch_size if buffers else 0)
            buffers = self._eager_buffers = self._new_buffers(lanes, max_len)
            size = lanes * max_len
            self._eager_slots = torch.zeros(size, dtype=torch.int32, device=buffers.out.device)
            self._eager_decodes.clear()
        if batch_size not in self._eager_decodes:
            self._eager_decodes[batch_size] = self._new_decode(
                batch_size, self._eager_slots, buffers
            )
        return self._eager_decodes[batch_size]

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``FasaBackend.forward_extend``, also for layers with attention sinks.

        Args:
            sinks: The layer's attention sinks, ``[num_qo_heads]``.

        The other arguments and the result are those of SGLang's
        ``AttentionBackend.forward_extend``.
        """
        dense = self.forward_metadata
        if sinks is not None:
            assert not dense.use_ragged
            wrappers = [SinkWrapper(wrapper, sinks) for wrapper in dense.prefill_wrappers]
            self.forward_metadata = dataclasses.replace(dense, prefill_wrappers=wrappers)
        try:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        finally:
            self.forward_metadata = dense

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """SGLang's decode, with ``SparseDecode`` as its wrapper where this step needs it.

        Args:
            sinks: The layer's attention sinks, ``[num_qo_heads]``.

        The other arguments and the result are those of SGLang's
        ``AttentionBackend.forward_decode``.
        """
        dense = self.forward_metadata
        kind = self.plan.kinds[layer.layer_id]
        wrappers: list[Any] = dense.decode_wrappers
        if (kind is LayerKind.SELECTS and self.variant is not Variant.DENSE) or (
            kind is LayerKind.DENSE and self.variant is Variant.MIXED
        ):
            self._decode.layer, self._decode.sink_logits = layer.layer_id, sinks
            wrappers = [self._decode] * len(wrappers)
        elif sinks is not None:
            wrappers = [SinkWrapper(wrapper, sinks) for wrapper in wrappers]
        if wrappers is not dense.decode_wrappers:
            self.forward_metadata = dataclasses.replace(dense, decode_wrappers=wrappers)
        try:
            out = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        finally:
            self.forward_metadata = dense
        self.write_labels(layer, forward_batch)
        if layer.layer_id == self.plan.last and self.variant is not Variant.DENSE:
            self._decode.end_step()
        return out

    def _needed(self) -> Variant:
        """The cheapest variant that covers the coming batch."""
        if all(lane.request is None for lane in self.lanes):
            return Variant.DENSE
        # In the SPARSE variant, dense layers use SGLang's own wrapper, which cannot skip pruned
        # tokens.
        selects_only = all(lane.planner_lane.selects_only for lane in self.lanes)
        return Variant.SPARSE if selects_only else Variant.MIXED

    def _start(self, decode: SparseDecode, forward_batch: Any, lanes: list[LaneStep]) -> None:
        kv_lens = forward_batch.seq_lens_cpu.tolist()
        decode.start(lanes, kv_lens, mixed=self.variant is Variant.MIXED)
        self._decode = decode

    def _new_buffers(self, max_batch_size: int, max_kv_len: int) -> PlannerBuffers:
        return PlannerBuffers(
            max_batch_size=max_batch_size,
            max_kv_len=max_kv_len,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_budget=self.config.max_budget,
            combine=self.config.combine,
            dtype=self.dtype,
            device=self.workspace_buffer.device,
        )

    def _new_decode(
        self, batch_size: int, slots: torch.Tensor, buffers: PlannerBuffers
    ) -> SparseDecode:
        planner = SparseIndexPlanner(
            self.workspace_buffer,
            batch_size=batch_size,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            paged_kv_indices_buffer=slots,
            buffers=buffers,
        )
        return SparseDecode(
            planner,
            slots,
            self.label_cache,
            self.plan,
            self.pruner.importance,
            self.num_selecting,
            self.config.combine,
        )
