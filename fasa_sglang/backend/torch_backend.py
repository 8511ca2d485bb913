"""FASA's reference backend: SGLang's torch backend plus selection, in float32 torch.

It runs wherever torch does, one request at a time. Prefill and dense decode are SGLang's own
code, so a request that does not use FASA gets exactly what ``torch_native`` gives.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.runtime_context import get_parallel

from fasa_sglang.backend.host import load_dominant_fcs
from fasa_sglang.backend.label_cache import LabelCache
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.config import FasaConfig
from fasa_sglang.ops import reference

logger = logging.getLogger(__name__)


class FasaTorchAttnBackend(TorchNativeAttnBackend):
    """Dense prefill, sparse decode for the lanes that ask for it.

    Args:
        runner: SGLang's ``ModelRunner``, its KV pool allocated.
        config: The server's settings; ``calibration`` must be set.

    Raises:
        FasaError: The calibration is missing, broken or of another model.
    """

    def __init__(self, runner: Any, config: FasaConfig) -> None:
        super().__init__(runner)
        self.config = config
        self.lanes: list[LaneStep] = []
        dominant, num_fcs = load_dominant_fcs(runner.model_config)
        parallel = get_parallel()
        dims = dominant.for_rank(parallel.attn_tp_rank, parallel.attn_tp_size).dims(num_fcs)
        pool = self.token_to_kv_pool
        self.first_layer = pool.start_layer
        self.num_layers = dominant.model.num_layers
        layers = slice(self.first_layer, self.first_layer + pool.layer_num)
        self.label_cache = LabelCache(
            dims[layers].to(pool.k_buffer[0].device), pool.k_buffer[0].shape[0], config.label_dtype
        )
        logger.info(
            "FASA: %s, selector %s, budget %d, sink %d, recent %d, %d of %d frequency chunks, "
            "combine %s, %d dense layers, sparse from %d tokens, default %s, labels %s %.1f MiB "
            "for %d slots, calibration %s",
            dominant.model.architecture,
            config.selector,
            config.budget,
            config.sink,
            config.recent,
            num_fcs,
            dominant.model.rope.num_chunks,
            config.combine,
            config.num_dense_layers,
            config.min_seq_len,
            config.default,
            config.label_dtype,
            self.label_cache.labels.nbytes / 2**20,
            self.label_cache.labels.shape[1],
            config.calibration,
        )

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare one forward pass: where the sparse lanes are, and a batch without them."""
        super().init_forward_metadata(forward_batch)
        self.sparse_lanes = [i for i, lane in enumerate(self.lanes) if lane.request is not None]
        if self.sparse_lanes:
            # The dense pass covers the whole batch; one token is the least it can read.
            self.dense_view = copy.copy(forward_batch)
            self.dense_view.seq_lens = forward_batch.seq_lens.clone()
            self.dense_view.seq_lens[self.sparse_lanes] = 1

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """SGLang's dense prefill; the labels are written beside the keys."""
        self._write_labels(k, layer, forward_batch)
        return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """SGLang's dense decode, then FASA in the lanes that asked for it."""
        self._write_labels(k, layer, forward_batch)
        if not self.sparse_lanes or layer.layer_id < self.config.num_dense_layers:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        out = super().forward_decode(q, k, v, layer, self.dense_view, save_kv_cache)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        for i in self.sparse_lanes:
            slots = self.req_to_token_pool.req_to_token[
                forward_batch.req_pool_indices[i], : self.lanes[i].seq_len
            ]
            out[i] = self._attend(q[i], slots, layer, self.lanes[i]).flatten().to(out.dtype)
        return out

    def _write_labels(self, k: torch.Tensor | None, layer: Any, forward_batch: Any) -> None:
        if k is not None:
            k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
            slots = forward_batch.out_cache_loc[: k.shape[0]]
            self.label_cache.write(layer.layer_id - self.first_layer, slots, k)

    def _attend(
        self, q: torch.Tensor, slots: torch.Tensor, layer: Any, lane: LaneStep
    ) -> torch.Tensor:
        """One lane of one layer: score, select, attend. ``q`` and the result ``[HQ, D]``."""
        assert lane.request is not None
        q, slots = q[None], slots[None]
        seq_lens = torch.tensor([lane.seq_len], device=q.device)
        k_cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_cache = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        scores = self._score(q, k_cache, slots, seq_lens, layer)
        positions, _ = reference.select_tokens(
            scores,
            seq_lens,
            budget=lane.request.budget,
            sink=lane.request.sink,
            recent=lane.request.recent,
            full_prefix_lens=torch.tensor([lane.full_prefix_len]),
        )
        return reference.focused_attention(
            q, k_cache, v_cache, slots, positions, sm_scale=layer.scaling
        )

    def _score(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        slots: torch.Tensor,
        seq_lens: torch.Tensor,
        layer: Any,
    ) -> torch.Tensor:
        """Rank the tokens with the configured selector, ``[1, HKV, L]``."""
        selector, combine = self.config.selector, self.config.combine
        if selector == "oracle":
            return reference.oracle_importance(q, k_cache, slots, seq_lens, sm_scale=layer.scaling)
        if selector == "quest":
            return reference.quest_importance(
                q, k_cache, slots, seq_lens, sm_scale=layer.scaling, combine=combine
            )
        if selector == "streaming":
            return reference.streaming_importance(seq_lens, k_cache.shape[1], slots.shape[1])
        if selector == "random":
            # Another draw for every layer and step, the same one in a repeated run.
            seed = hash((self.config.seed, layer.layer_id, slots.shape[1]))
            return reference.random_importance(
                seq_lens, k_cache.shape[1], slots.shape[1], seed=seed
            )
        local = layer.layer_id - self.first_layer
        return reference.token_importance(
            q,
            self.label_cache.labels[local],
            self.label_cache.dominant_dims[local],
            slots,
            seq_lens,
            sm_scale=layer.scaling,
            combine=combine,
        )
