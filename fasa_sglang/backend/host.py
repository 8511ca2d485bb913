"""What differs between SGLang versions and what FASA cannot work with, in one place."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs, ModelShape
from fasa_sglang.errors import ConfigError, UnsupportedHostError
from fasa_sglang.plugin import BACKEND_NAME

# Server flag: (the value FASA works with, why).
FLAGS: dict[str, tuple[Any, str]] = {
    "speculative_algorithm": (None, "verification reads several tokens a step"),
    "enable_mixed_chunk": (False, "decode steps inside a prefill batch would run dense"),
    "enable_hierarchical_cache": (False, "it loads keys that have no label"),
    "disaggregation_mode": ("null", "transferred keys have no label"),
    "enable_two_batch_overlap": (False, "it splits the batch behind the backend"),
    "dcp_size": (1, "each rank holds a part of a request's keys"),
    "attn_cp_size": (1, "each rank holds a part of a request's keys"),
    "enable_pdmux": (False, "it splits the batch behind the backend"),
    "tokenizer_worker_num": (1, "SGLang loads no plugin in the workers that would check requests"),
    "enable_memory_saver": (False, "the label cache would survive a released KV pool"),
}


def require_supported_host(runner: Any) -> None:
    """Refuse what FASA cannot work with, one sentence each.

    Raises:
        UnsupportedHostError: A hook is missing, or a flag, the pool or the device does not fit.
    """
    _require_hooks()
    args = runner.server_args
    for name, (needed, why) in FLAGS.items():
        got = getattr(args, name, needed)
        if got not in (None, needed):
            raise UnsupportedHostError(
                f"FASA does not work with {name}={got!r} ({why}); expected {needed!r}, or another "
                "attention backend"
            )
    prefill = getattr(args, "prefill_attention_backend", None)
    if prefill not in (None, BACKEND_NAME):
        raise UnsupportedHostError(
            f"prefill_attention_backend={prefill!r} would fill keys that have no label; leave it "
            "out, so that fasa serves prefill too"
        )
    pool = runner.token_to_kv_pool
    if type(pool) is not MHATokenToKVPool:
        raise UnsupportedHostError(
            f"FASA needs SGLang's MHATokenToKVPool, got {type(pool).__name__} (MLA, sliding "
            "windows, hybrid models and fp4 keys have others); use another attention backend"
        )
    if pool.page_size != 1:
        raise UnsupportedHostError(
            f"FASA selects single tokens and needs page_size 1, got {pool.page_size}; "
            "start with --page-size 1"
        )
    keys = pool.k_buffer[0]
    if keys.dim() != 3 or not keys.is_contiguous():
        raise UnsupportedHostError(
            f"FASA needs keys laid out [slots, kv_heads, head_dim], got {tuple(keys.shape)}; "
            "unset SGLANG_USE_HND_KVCACHE"
        )
    if keys.dtype != runner.dtype:
        raise UnsupportedHostError(
            f"FASA's torch backend needs keys of the model's {runner.dtype}, got {keys.dtype}; "
            "leave out --kv-cache-dtype"
        )
    if keys.device.type == "cuda" and runner_uses_graphs(runner):
        raise UnsupportedHostError(
            "FASA's torch backend cannot be captured in CUDA graphs; start with "
            "--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled"
        )


def runner_uses_graphs(runner: Any) -> bool:
    """Whether SGLang is going to capture decode graphs."""
    return getattr(runner.server_args, "cuda_graph_backend_decode", None) != "disabled"


def uses_fasa(server_args: Any) -> bool:
    """Whether this server decodes with our backend."""
    names = (server_args.attention_backend, getattr(server_args, "decode_attention_backend", None))
    return BACKEND_NAME in names


def fasa_config(model_config: Any) -> FasaConfig:
    """The server's FASA settings, read once per process and kept on SGLang's ``ModelConfig``."""
    config = getattr(model_config, "fasa_config", None)
    if config is None:
        config = FasaConfig.load(model_config.model_override_args.get("fasa"))
        model_config.fasa_config = config
    return config


def load_dominant_fcs(model_config: Any) -> tuple[DominantFCs, int]:
    """The calibration of the served model and the number of chunks to read from it.

    Raises:
        FasaError: The calibration is not set, broken, of another model, or has fewer chunks.
    """
    config = fasa_config(model_config)
    if config.calibration is None:
        raise ConfigError(
            "FASA needs a calibration file; run: fasa calibrate --model <model> --out FILE, and "
            "start the server with --json-model-override-args "
            '\'{"fasa": {"calibration": "FILE"}}\''
        )
    dominant = DominantFCs.load(config.calibration)
    dominant.check_model(ModelShape.from_config(model_config.hf_config), config.calibration)
    num_fcs = config.num_fcs or dominant.num_fcs
    dominant.model.check_num_fcs(num_fcs)
    return dominant, num_fcs


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


# The method that says how much of an ending request the radix tree may keep.
KEPT_LEN_METHOD = "owned_kv_len" if hasattr(Req, "owned_kv_len") else "effective_kv_committed_len"


def missing_hooks() -> list[str]:
    """Targets of ours that SGLang did not patch (it logs and goes on)."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from fasa_sglang.backend.hooks import HOOKS

    return [hook.target for hook in HOOKS if hook.target not in HookRegistry._patched]


def _require_hooks() -> None:
    missing = missing_hooks()
    if missing:
        from sglang.version import __version__

        raise UnsupportedHostError(
            f"SGLang {__version__} lacks {', '.join(missing)}, which FASA hooks; use SGLang 0.5.17 "
            "to 0.5.23, and see fasa doctor"
        )
