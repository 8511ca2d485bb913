"""SGLang as it differs between releases; told apart by ``hasattr``, never by version number."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
from sglang.srt.environ import envs
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.model_executor import pool_configurator
from sglang.srt.runtime_context import get_exec, get_parallel

SUPPORTED_VERSIONS = "SGLang 0.5.17 to 0.5.23"
# SGLang 0.5.23 validates the body of /generate against its own schema.
CHECKS_BODIES = find_spec("sglang.srt.entrypoints.api_contract") is not None
# SGLang 0.5.23 checks backends against the model in a module that one function can be patched in.
CHECKS_MODELS = find_spec("sglang.srt.arg_groups.model_hook") is not None
# The method that returns how much of a finishing request the radix tree may keep.
EXACT_LEN_METHOD = "owned_kv_len" if hasattr(Req, "owned_kv_len") else "effective_kv_committed_len"

# The argument of release_kv_cache that says whether the radix tree may take an ending request.
TREE_INSERT_ARGUMENT = (
    "checkpoint" if "checkpoint" in signature(release_kv_cache).parameters else "is_insert"
)

# Sizes the pool of sliding windows by the number of requests instead of a ratio.
SWA_CAP_CONFIGURATOR = (
    "SWARequestCapPoolConfigurator"
    if hasattr(pool_configurator, "SWARequestCapPoolConfigurator")
    else "SWAChunkCapPoolConfigurator"
)


def resolved_args(server_args: Any) -> Any:
    """Read-only view of the server's flags after SGLang has resolved them.

    Since 0.5.20 ``ServerArgs`` keeps the operator's input and SGLang's decisions lie beside it.
    """
    return resolved_view(server_args)


def attention_backends(server_args: Any) -> tuple[str | None, str | None]:
    """Names of the attention backends for (prefill, decode) that SGLang resolved."""
    prefill, decode = attention_backends_of(resolved_args(server_args))
    return prefill, decode


def environment_value(name: str) -> Any:
    """Value of one of SGLang's environment variables, parsed by SGLang.

    Raises:
        AttributeError: The installed SGLang has no such variable.
    """
    return getattr(envs, name).get()


def heads_of_rank(model_config: Any) -> tuple[int, int]:
    """Numbers of query heads and KV heads on one tensor-parallel rank."""
    tp_size = get_parallel().attn_tp_size
    return model_config.num_attention_heads // tp_size, model_config.get_num_kv_heads(tp_size)


def set_extend_range(req: Any, start: int, end: int, row: torch.Tensor | None) -> None:
    """Tell a request which of its tokens the coming prefill computes.

    Args:
        req: SGLang's ``Req``.
        start: First token; those before it are in the KV pool.
        end: One past the last token.
        row: Slots of the request's tokens; None before the first prefill.
    """
    if hasattr(req, "set_extend_range"):  # until SGLang 0.5.19
        if row is not None:
            req.prefix_indices = row[:start].to(req.prefix_indices.dtype)
        req.set_extend_range(start, end)
        return
    req.prefix_len, req.extend_end = start, end


def full_attention_backend(runner: Any) -> Any:
    """The backend of decode steps in full attention layers; None before there is one.

    SGLang wraps it for models that have linear attention in other layers, and combines it with a
    backend of its own for prefill, in either order.
    """
    backend = _without_linear(getattr(runner, "attn_backend", None))
    if isinstance(backend, HybridAttnBackend):
        backend = _without_linear(backend.decode_backend)
    return backend


def split_backend(runner: Any) -> HybridAttnBackend | None:
    """SGLang's combination of a prefill and a decode backend; None if one backend runs both."""
    backend = _without_linear(runner.attn_backend)
    return backend if isinstance(backend, HybridAttnBackend) else None


def _without_linear(backend: Any) -> Any:
    return getattr(backend, "full_attn_backend", backend)


def full_attention_pool(pool: Any) -> Any:
    """The part of a KV pool that belongs to the layers which attend to every token.

    Its slots are those of ``req_to_token``. SGLang keeps sliding windows in a pool of their own,
    and recurrent states elsewhere.
    """
    return getattr(pool, "full_kv_pool", pool)


def decode_graph_settings() -> Any:
    """SGLang's settings for decode CUDA graphs, with ``backend``, ``bs`` and ``max_bs``."""
    return get_exec().graph.cuda_graph_config.decode


def free_row_tail(req: Any, start: int, end: int, tree_cache: Any) -> None:
    """Free the KV slots of positions ``[start, end)`` of a finishing request."""
    if hasattr(tree_cache, "free_kv_row"):  # SGLang 0.5.23
        tree_cache.free_kv_row(req.kv, [(start, end)])
        return
    row = tree_cache.req_to_token_pool.req_to_token[request_row(req)]
    tree_cache.token_to_kv_pool_allocator.free_segment(row[start:end], start_pos=start)


def request_row(req: Any) -> int:
    """Row of ``req_to_token`` that belongs to a running request; SGLang 0.5.20 moved it."""
    return req.req_pool_idx if hasattr(req, "req_pool_idx") else req.kv.req_pool_idx


def protected_len(req: Any) -> int:
    """Number of leading tokens of a running request whose slots belong to the radix tree."""
    holder = req if hasattr(req, "cache_protected_len") else req.kv
    return holder.cache_protected_len


def row_lengths(batch: Any) -> Sequence[int]:
    """Number of tokens in every row of a decode batch, the current token included.

    With beam search, SGLang 0.5.23 appends rows that belong to no request; they come last.
    """
    return batch.seq_lens_cpu.tolist()
