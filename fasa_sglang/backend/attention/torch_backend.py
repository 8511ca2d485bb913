"""FASA's reference backend: SGLang's torch backend plus token selection in float32 torch.

It runs wherever torch does and handles one request at a time. Prefill and dense decode are SGLang's
own code, so a request without FASA gets exactly the output of ``torch_native``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from fasa_sglang.backend.attention.base import FasaBackend
from fasa_sglang.backend.attention.selector_scores import selector_scores
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.config import FasaConfig
from fasa_sglang.ops import reference


class FasaTorchAttnBackend(FasaBackend, TorchNativeAttnBackend):
    """Dense prefill; sparse decode for the lanes that use FASA.

    Args:
        runner: SGLang's ``ModelRunner``, its KV pool allocated.
        config: The server's settings.
    """

    def __init__(self, runner: Any, config: FasaConfig) -> None:
        super().__init__(runner)
        self.start_fasa(runner, config)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare one forward pass: find the sparse lanes and shorten them in the dense pass."""
        super().init_forward_metadata(forward_batch)
        sparse = [i for i, lane in enumerate(self.lanes) if lane.request is not None]
        # Lanes that FASA attends itself, by whether the layer selects. SGLang's dense attention
        # cannot skip pruned tokens, so FASA also serves lanes with pruned tokens in dense layers.
        self.own_lanes = {True: sparse, False: [i for i in sparse if self.lanes[i].pruned]}
        self.dense_views = {}
        for selects, lanes in self.own_lanes.items():
            # The dense pass covers the whole batch and reads at least one token per lane.
            self.dense_views[selects] = view = copy.copy(forward_batch)
            if lanes:
                view.seq_lens = forward_batch.seq_lens.clone()
                view.seq_lens[lanes] = 1

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """SGLang's dense decode, then FASA's attention for the lanes in ``own_lanes``.

        Arguments and result are those of SGLang's ``AttentionBackend.forward_decode``.
        """
        selects = self.plan.selects(layer.layer_id)
        view = self.dense_views[selects]
        out = super().forward_decode(q, k, v, layer, view, save_kv_cache)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        for i in self.own_lanes[selects]:
            slots = self._slots(forward_batch, i)
            out[i] = self._attend(q[i], slots, layer, self.lanes[i]).flatten().to(out.dtype)
        self.write_labels(layer, forward_batch)
        if layer.layer_id == self.plan.last:
            self._end_step(forward_batch)
        return out

    def _slots(self, forward_batch: Any, i: int) -> torch.Tensor:
        """KV slots of a lane's tokens that are not pruned, in order, ``[live_len]``."""
        row = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices[i]]
        slots = row[: self.lanes[i].seq_len]
        return slots[slots != 0] if self.lanes[i].pruned else slots

    def _end_step(self, forward_batch: Any) -> None:
        if not self.num_selecting:
            return
        for i in self.own_lanes[True]:
            lane = self.lanes[i]
            if lane.prunes:
                slots = self._slots(forward_batch, i)[lane.prompt_len :]
                self.pruner.importance.end_step(slots, self.num_selecting)

    def _attend(
        self, q: torch.Tensor, slots: torch.Tensor, layer: Any, lane: LaneStep
    ) -> torch.Tensor:
        """Attention of one lane in one layer: score, select, attend.

        Args:
            q: Queries after RoPE, ``[num_qo_heads, head_dim]``.
            slots: KV slots of the lane's tokens that are not pruned, ``[live_len]``.
            layer: SGLang's ``RadixAttention``.
            lane: The lane's step; ``request`` is set.

        Returns:
            ``[num_qo_heads, head_dim]``, float32.
        """
        assert lane.request is not None
        q, slots = q[None], slots[None].long()
        seq_lens = torch.tensor([lane.live_len], device=q.device)
        k_cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_cache = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        if not self.plan.selects(layer.layer_id):
            everything = torch.arange(lane.live_len, device=q.device)
            positions = everything.expand(1, k_cache.shape[1], -1)
        else:
            scores = selector_scores(
                lane.request,
                self.label_cache,
                layer.layer_id,
                q,
                k_cache,
                slots,
                seq_lens,
                [lane.live_len],
                sm_scale=layer.scaling,
                combine=self.config.combine,
            )
            positions, _ = reference.select_tokens(
                scores,
                seq_lens,
                budget=lane.request.budget,
                sink=lane.request.sink,
                recent=lane.request.recent,
                full_prefix_lens=torch.tensor([lane.full_prefix_len]),
            )
            if lane.prunes:
                self.pruner.importance.count(slots[0][positions])
        return reference.focused_attention(
            q, k_cache, v_cache, slots, positions, sm_scale=layer.scaling
        )
