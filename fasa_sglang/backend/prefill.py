"""Prefill a text through the model runner, before the server takes requests."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import get_pp_group
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from fasa_sglang.backend.host import request_row, set_extend_range


class Prefill:
    """Prefills one text at a time through SGLang's own batches, in chunks as the server would.

    The KV pool must hold nothing else.

    Args:
        runner: SGLang's ``ModelRunner``.
        chunk_tokens: Largest number of tokens of one forward pass.
    """

    def __init__(self, runner: Any, chunk_tokens: int) -> None:
        self._runner, self._chunk_tokens = runner, chunk_tokens

    def run(self, ids: list[int], first_position: int = 0) -> torch.Tensor:
        """Prefill a text; ``clear`` must follow before the next one.

        Args:
            ids: Token ids of the text.
            first_position: Position of the first token, which only RoPE sees.

        Returns:
            The KV slots of its tokens, ``[len(ids)]``, int64.
        """
        params = SamplingParams(temperature=0.0, max_new_tokens=1)
        params.normalize(None)
        req = Req(
            rid="fasa-calibration",
            origin_input_text="",
            origin_input_ids=array("q", ids),
            sampling_params=params,
        )
        req.full_untruncated_fill_ids = req.origin_input_ids
        req.logprob_start_len = -1
        row = None
        for start in range(0, len(ids), self._chunk_tokens):
            end = min(start + self._chunk_tokens, len(ids))
            set_extend_range(req, start, end, row)
            self._extend(req, first_position)
            row = self._runner.req_to_token_pool.req_to_token[request_row(req)]
        assert row is not None
        return row[: len(ids)].long()

    def clear(self) -> None:
        """Empty the KV pool."""
        self._runner.req_to_token_pool.clear()
        self._runner.token_to_kv_pool_allocator.clear()

    def _extend(self, req: Any, first_position: int) -> None:
        runner = self._runner
        # No radix cache exists yet; this is all that allocation asks of one.
        tree_cache = SimpleNamespace(
            page_size=runner.token_to_kv_pool_allocator.page_size,
            device=runner.device,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            supports_swa=lambda: False,
            supports_mamba=lambda: False,
            supports_prefix_sharing=lambda: True,
            is_chunk_cache=lambda: True,
            is_tree_cache=lambda: False,
            evict=lambda *args: None,
            maybe_hand_to_session=lambda req: None,
        )
        batch = ScheduleBatch.init_new(
            reqs=[req],
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            tree_cache=tree_cache,
            model_config=runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
        forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        forward_batch.positions.add_(first_position)
        if forward_batch.mrope_positions is not None:
            forward_batch.mrope_positions.add_(first_position)
        self._forward(forward_batch)

    def _forward(self, forward_batch: Any) -> None:
        """Run this rank's layers between those of the neighbouring pipeline stages."""
        group = get_pp_group()
        received = None
        if not group.is_first_rank:
            received = PPProxyTensors(group.recv_tensor_dict())
        output = self._runner.forward(forward_batch, pp_proxy_tensors=received).logits_output
        if not group.is_last_rank:
            group.send_tensor_dict(output.tensors)
