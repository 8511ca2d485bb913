"""Differences between SGLang versions, told apart by ``hasattr`` and never by version number."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import get_exec, get_parallel

# SGLang 0.5.23 checks the body of /generate against a schema of its own.
CHECKS_BODIES = find_spec("sglang.srt.entrypoints.api_contract") is not None
# The method that says how much of an ending request the radix tree may keep.
EXACT_LEN_METHOD = "owned_kv_len" if hasattr(Req, "owned_kv_len") else "effective_kv_committed_len"


def attention_backends(server_args: Any) -> tuple[str | None, str | None]:
    """The (prefill, decode) pair of attention backends, resolved as SGLang does."""
    common = server_args.attention_backend
    prefill = getattr(server_args, "prefill_attention_backend", None) or common
    decode = getattr(server_args, "decode_attention_backend", None) or common
    return prefill, decode


def heads_of_rank(model_config: Any) -> tuple[int, int]:
    """Query and KV heads that one tensor-parallel rank holds."""
    tp_size = get_parallel().attn_tp_size
    return model_config.num_attention_heads // tp_size, model_config.get_num_kv_heads(tp_size)


def first_layer_of_stage(configurator_source: Any) -> int:
    """First layer of this pipeline stage, from what SGLang hands to its pool configurator.

    Args:
        configurator_source: The model runner, or SGLang 0.5.23's ``KVCacheConfigurator``.
    """
    holder = getattr(configurator_source, "layer_info", configurator_source)
    return holder.start_layer


def decode_graph_settings() -> Any:
    """SGLang's settings of decode CUDA graphs: ``backend``, ``bs`` and ``max_bs``."""
    return get_exec().graph.cuda_graph_config.decode


def free_row_tail(req: Any, start: int, end: int, tree_cache: Any) -> None:
    """Give back the KV slots of positions ``start`` to ``end`` of a request that ends."""
    if hasattr(tree_cache, "free_kv_row"):  # SGLang 0.5.23
        tree_cache.free_kv_row(req.kv, [(start, end)])
        return
    row = tree_cache.req_to_token_pool.req_to_token[request_row(req)]
    tree_cache.token_to_kv_pool_allocator.free_segment(row[start:end], start_pos=start)


def request_row(req: Any) -> int:
    """A running request's row of ``req_to_token``; SGLang 0.5.20 moved it."""
    return req.req_pool_idx if hasattr(req, "req_pool_idx") else req.kv.req_pool_idx


def protected_len(req: Any) -> int:
    """Leading tokens of a running request whose slots the radix tree owns."""
    holder = req if hasattr(req, "cache_protected_len") else req.kv
    return holder.cache_protected_len


def row_lengths(batch: Any) -> Sequence[int]:
    """Tokens of every row of a decode batch.

    With beam search, SGLang 0.5.23 appends rows that belong to no request; they come last.
    """
    return batch.seq_lens_cpu.tolist()
