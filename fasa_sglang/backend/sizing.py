"""GPU memory that SGLang must leave free beside its KV pool: labels and scratch buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fasa_sglang.backend.host import decode_graph_settings, heads_of_rank
from fasa_sglang.backend.served import fasa_config, uses_fasa
from fasa_sglang.backend.served_model import served_model
from fasa_sglang.config import FasaConfig
from fasa_sglang.ops.label_format import LABEL_FORMATS


def reserve_label_bytes(
    original: Callable[..., int], configurator: Any, kvc: Any, num_layers: int
) -> int:
    """Add the label cache to the bytes per token by which SGLang sizes its KV pool."""
    cell_size = original(configurator, kvc, num_layers)
    if not uses_fasa(kvc.server_args):
        return cell_size
    return cell_size + _reserved_label_bytes(configurator, kvc)


def reserve_label_bytes_beside_windows(
    result: None, configurator: Any, kvc: Any, *args: Any, **kwargs: Any
) -> None:
    """As ``reserve_label_bytes``, where sliding windows have a KV pool of their own.

    SGLang divides the memory between two pools. Labels belong to the one of the other layers, by
    whose tokens it counts.
    """
    num_layers = configurator._full_layers_num
    if not uses_fasa(kvc.server_args) or not num_layers:
        return
    per_layer = -(-_reserved_label_bytes(configurator, kvc) // num_layers)
    configurator._full_per_token += per_layer
    configurator._cell_size += per_layer * num_layers


def _reserved_label_bytes(configurator: Any, kvc: Any) -> int:
    """Label bytes per token; also tells ``reserve_scratch`` how much to subtract."""
    model, config = served_model(kvc.model_config), fasa_config(kvc.model_config)
    _, num_kv_heads = heads_of_rank(kvc.model_config)
    configurator.fasa_scratch_bytes = graph_scratch_bytes(kvc.model_config, config)
    label_format = LABEL_FORMATS[config.label_dtype]
    return label_format.bytes_per_token(len(model.plan.selecting), num_kv_heads, model.num_fcs)


def reserve_scratch(
    configurator: Any, available_bytes: int, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Subtract the scratch buffers of captured steps from the memory that the pool may use."""
    reserved = getattr(configurator, "fasa_scratch_bytes", 0)
    return (configurator, available_bytes - reserved, *args), kwargs


def graph_scratch_bytes(model_config: Any, config: FasaConfig) -> int:
    """Bytes of scratch buffers that captured sparse steps will allocate; 0 without CUDA graphs."""
    decode = decode_graph_settings()
    if decode.backend == "disabled":
        return 0
    from fasa_sglang.flashinfer_ext.buffers import PlannerBuffers

    num_qo_heads, num_kv_heads = heads_of_rank(model_config)
    return PlannerBuffers(
        max_batch_size=max(decode.bs or [decode.max_bs]),
        max_kv_len=model_config.context_len,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=model_config.head_dim,
        max_budget=config.max_budget,
        combine=config.combine,
        dtype=model_config.dtype,
        device="meta",
    ).nbytes
