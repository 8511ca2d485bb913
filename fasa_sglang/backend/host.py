"""What differs between SGLang versions and what FASA cannot work with, in one place."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_exec, get_parallel

from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs, ModelShape
from fasa_sglang.errors import ConfigError, UnsupportedHostError
from fasa_sglang.plugin import BACKEND_NAME

HEAD_DIMS = (64, 128, 256)

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
    "enable_deterministic_inference": (False, "tokens are selected in no fixed order"),
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
            f"FASA needs keys of the model's {runner.dtype}, got {keys.dtype}; leave out "
            "--kv-cache-dtype"
        )
    graphs = get_exec().graph.cuda_graph_config.decode.backend
    if serves_on_flashinfer(runner):
        selector = fasa_config(runner.model_config).selector
        if selector != "fasa" and graphs != "disabled":
            raise UnsupportedHostError(
                f"selector {selector!r} ranks in torch and cannot be captured in CUDA graphs; "
                "start with --cuda-graph-backend-decode disabled"
            )
        if keys.dtype not in (torch.float16, torch.bfloat16) or keys.shape[2] not in HEAD_DIMS:
            raise UnsupportedHostError(
                f"FlashInfer attends to float16 or bfloat16 heads of {HEAD_DIMS} dims, got "
                f"{keys.dtype} and {keys.shape[2]}; use another attention backend"
            )
        if graphs not in ("full", "disabled"):
            raise UnsupportedHostError(
                f"FASA's decode graphs are whole ones, got {graphs}; start with "
                "--cuda-graph-backend-decode full, or disabled"
            )


def serves_on_flashinfer(runner: Any) -> bool:
    """Whether the GPU backend serves; the torch backend serves CPUs."""
    return runner.token_to_kv_pool.k_buffer[0].is_cuda


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

    Read once per process, like ``fasa_config``.

    Raises:
        FasaError: The calibration is not set, broken, of another model, or has fewer chunks.
    """
    kept = getattr(model_config, "fasa_dominant_fcs", None)
    if kept is not None:
        return kept
    config = fasa_config(model_config)
    if config.calibration is None:
        raise ConfigError(
            "FASA needs a calibration file; run: fasa calibrate --model <model> --out FILE, and "
            "start the server with --json-model-override-args "
            '\'{"fasa": {"calibration": "FILE"}}\''
        )
    path: str | Path = config.calibration
    if path == "auto":
        path = cached_calibration(model_config.model_path)
        if not path.exists():
            raise ConfigError(
                f"no calibration of {model_config.model_path} is kept at {path}; run once: fasa "
                f"serve {model_config.model_path}"
            )
    dominant = DominantFCs.load(path)
    dominant.check_model(ModelShape.from_config(model_config.hf_config, config.interleaved), path)
    num_fcs = config.num_fcs or dominant.num_fcs
    dominant.model.check_num_fcs(num_fcs)
    model_config.fasa_dominant_fcs = dominant, num_fcs
    return dominant, num_fcs


def heads_of_rank(model_config: Any) -> tuple[int, int]:
    """Query and KV heads that one tensor-parallel rank holds."""
    tp_size = get_parallel().attn_tp_size
    return model_config.num_attention_heads // tp_size, model_config.get_num_kv_heads(tp_size)


def graph_scratch_bytes(model_config: Any, config: FasaConfig) -> int:
    """Bytes that captured sparse steps will allocate beside labels and pool."""
    decode = get_exec().graph.cuda_graph_config.decode
    if decode.backend == "disabled":
        return 0
    from fasa_sglang.backend.scratch import Scratch

    planned = Scratch(
        max(decode.bs or [decode.max_bs]),
        model_config.context_len,
        *heads_of_rank(model_config),
        model_config.head_dim,
        config,
        model_config.dtype,
        torch.device("meta"),
    )
    return planned.nbytes


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


# SGLang 0.5.23 checks the body of /generate against a schema of its own.
CHECKS_BODIES = find_spec("sglang.srt.entrypoints.api_contract") is not None
# The method that says how much of an ending request the radix tree may keep.
KEPT_LEN_METHOD = "owned_kv_len" if hasattr(Req, "owned_kv_len") else "effective_kv_committed_len"


def missing_hooks() -> list[str]:
    """Targets of ours that SGLang did not patch (it logs and goes on), with the reason."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from fasa_sglang.backend.hooks import HOOKS

    targets = [hook.target for hook in HOOKS if hook.target not in HookRegistry._patched]
    return [f"{target} ({_why_missing(target)})" for target in targets]


def _why_missing(target: str) -> str:
    """What keeps SGLang's module from being imported; SGLang's own message hides it."""
    module = target
    while "." in module:
        module = module.rpartition(".")[0]
        try:
            if find_spec(module) is None:
                continue
        except ModuleNotFoundError:  # a class, or a module that cannot be imported: its turn comes
            continue
        try:
            import_module(module)
        except ImportError as error:
            return str(error)
        break
    return "not there"


def _require_hooks() -> None:
    missing = missing_hooks()
    if missing:
        from sglang.version import __version__

        raise UnsupportedHostError(
            f"FASA cannot hook {', '.join(missing)} in SGLang {__version__}; use SGLang 0.5.17 to "
            "0.5.23 with all packages it needs, and see fasa doctor"
        )
