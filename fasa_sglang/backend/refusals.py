"""Everything that FASA refuses at server start, each with its reason."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.version import __version__ as sglang_version

from fasa_sglang.backend.host import (
    SUPPORTED_VERSIONS,
    attention_backends,
    decode_graph_settings,
    environment_value,
    full_attention_pool,
    resolved_args,
)
from fasa_sglang.backend.served import fasa_config, serves_on_flashinfer
from fasa_sglang.backend.served_model import served_model
from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.names import BACKEND_NAME
from fasa_sglang.ops.label_format import LABEL_FORMATS

HEAD_DIMS = (64, 128, 256)
# Backends that may prefill. Other ones may store keys elsewhere or in another layout.
PREFILL_BACKENDS = (BACKEND_NAME, "fa3", "flashinfer", "triton", "torch_native")

_NO_LABELS = "it loads keys that have no labels"
_NO_CHECK = "requests would bypass the process that reads fasa and returns its report"

# Server flag: (the value that FASA works with, why other values do not work).
FLAGS: dict[str, tuple[Any, str]] = {
    "speculative_algorithm": (None, "verification reads several tokens per step"),
    "dllm_algorithm": (None, "diffusion models decode blocks of tokens in prefill steps"),
    "enable_mixed_chunk": (False, "decode steps inside a prefill batch would run dense"),
    "enable_hierarchical_cache": (False, _NO_LABELS),
    "hicache_storage_backend": (None, _NO_LABELS),
    "enable_lmcache": (False, _NO_LABELS),
    "enable_flexkv": (False, _NO_LABELS),
    "enable_unified_cache_external_linker": (False, _NO_LABELS),
    "radix_cache_backend": (None, "a custom cache may load keys that have no labels"),
    "disaggregation_mode": ("null", "transferred keys have no labels"),
    "disaggregation_decode_enable_offload_kvcache": (False, _NO_LABELS),
    "enable_streaming_session": (False, "a session would reuse approximate keys as exact ones"),
    "enable_two_batch_overlap": (False, "SGLang wraps the backend and splits its batches"),
    "enable_pdmux": (False, "SGLang runs several copies of the backend"),
    "dcp_size": (1, "each rank holds only a part of a request's keys"),
    "attn_cp_size": (1, "each rank holds only a part of a request's keys"),
    "enable_nvidia_megakernel": (False, "it replaces the model's attention"),
    "enable_amd_monokernel": (False, "it replaces the model's attention"),
    "tokenizer_worker_num": (1, "SGLang loads no plugins in additional tokenizer workers"),
    "smg_grpc_mode": (False, _NO_CHECK),
    "enable_deterministic_inference": (False, "the order of selected tokens is not deterministic"),
    "enable_memory_saver": (False, "the label cache would survive a released KV pool"),
}

# Environment variable of SGLang: (the value that FASA works with, why others do not work).
ENVIRONMENT: dict[str, tuple[Any, str]] = {
    "SGLANG_RUST_SERVER": (False, _NO_CHECK),
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": (False, "a graph would replay the plan of one step"),
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": (False, "labels are sized before CUDA graph capture"),
}

# Not in every supported release. Any other name that SGLang does not know is an error.
ONLY_IN_SOME_RELEASES = frozenset(
    {
        "enable_unified_cache_external_linker",
        "enable_nvidia_megakernel",
        "enable_amd_monokernel",
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
    }
)


def require_supported_host(runner: Any) -> None:
    """Refuse a server in which FASA cannot work.

    Args:
        runner: SGLang's ``ModelRunner``, its KV pool allocated.

    Raises:
        UnsupportedHostError: A hook could not be installed, or a flag, an environment variable, the
            KV pool or the GPU is not supported.
    """
    _require_hooks()
    require_flags(runner.server_args)
    require_environment()
    _require_backends(runner)
    pool = full_attention_pool(runner.token_to_kv_pool)
    if type(pool) is not MHATokenToKVPool:
        raise UnsupportedHostError(
            f"FASA needs SGLang's MHATokenToKVPool for the layers that attend to every token, got "
            f"{type(pool).__name__} (MLA, fp4 keys and unified memory have others); use another "
            "attention backend"
        )
    if pool.page_size != 1:
        raise UnsupportedHostError(
            f"FASA selects single tokens and needs page_size 1, got {pool.page_size}; "
            "start with --page-size 1"
        )
    keys = pool.k_buffer[0]
    if keys.dim() != 3 or not keys.is_contiguous():
        raise UnsupportedHostError(
            f"FASA needs keys laid out as [slots, kv_heads, head_dim], got {tuple(keys.shape)}; "
            "unset SGLANG_USE_HND_KVCACHE"
        )
    if keys.dtype != runner.dtype:
        raise UnsupportedHostError(
            f"FASA needs keys in the model's dtype {runner.dtype}, got {keys.dtype}; leave out "
            "--kv-cache-dtype"
        )
    if serves_on_flashinfer(runner):
        _require_supported_gpu(runner, keys)
    else:
        _require_served_on_cpu(runner)


def require_flags(server_args: Any) -> None:
    """Refuse server flags from ``FLAGS``.

    Raises:
        UnsupportedHostError: A flag has another value than FASA works with, or the installed SGLang
            does not have a flag that every supported release has.
    """
    args = resolved_args(server_args)
    for name, (supported, reason) in FLAGS.items():
        try:
            value = getattr(args, name)
        except AttributeError:
            _require_optional(name)
            continue
        if value not in (None, supported):
            raise UnsupportedHostError(
                f"FASA does not work with {name}={value!r} ({reason}); expected {supported!r}, or "
                "another attention backend"
            )


def require_environment() -> None:
    """Refuse environment variables from ``ENVIRONMENT``.

    Raises:
        UnsupportedHostError: As for ``require_flags``.
    """
    for name, (supported, reason) in ENVIRONMENT.items():
        try:
            value = environment_value(name)
        except AttributeError:
            _require_optional(name)
            continue
        if value != supported:
            raise UnsupportedHostError(
                f"FASA does not work with {name}={value!r} in the environment ({reason}); unset "
                "it, or use another attention backend"
            )


def _require_backends(runner: Any) -> None:
    prefill, decode = attention_backends(runner.server_args)
    if decode != BACKEND_NAME:
        raise UnsupportedHostError(
            f"FASA selects tokens in decode steps, which {decode!r} would run; start with "
            "--attention-backend fasa alone, or with --decode-attention-backend fasa"
        )
    if prefill not in PREFILL_BACKENDS:
        raise UnsupportedHostError(
            f"FASA works with prefill by {', '.join(PREFILL_BACKENDS)}, got {prefill!r}; leave out "
            "--prefill-attention-backend"
        )
    windows = runner.sliding_window_size is not None
    if prefill == "flashinfer" and (windows or served_model(runner.model_config).has_sink_logits):
        raise UnsupportedHostError(
            "SGLang's prefill by flashinfer has no attention sinks and ignores sliding windows in "
            "prompts without a cached prefix, and this model needs them; leave out "
            "--prefill-attention-backend"
        )


def _require_optional(name: str) -> None:
    if name not in ONLY_IN_SOME_RELEASES:
        raise UnsupportedHostError(
            f"SGLang {sglang_version} does not know {name}, which FASA has to check; use "
            f"{SUPPORTED_VERSIONS}"
        )


def _require_supported_gpu(runner: Any, keys: torch.Tensor) -> None:
    config = fasa_config(runner.model_config)
    graphs = decode_graph_settings().backend
    if config.selector != "fasa" and graphs != "disabled":
        raise UnsupportedHostError(
            f"selector {config.selector!r} ranks tokens in torch and cannot be captured in CUDA "
            "graphs; start with --cuda-graph-backend-decode disabled"
        )
    if keys.dtype not in (torch.float16, torch.bfloat16) or keys.shape[2] not in HEAD_DIMS:
        raise UnsupportedHostError(
            "FASA on a GPU needs float16 or bfloat16 keys with a head_dim of "
            f"{', '.join(map(str, HEAD_DIMS))}, got {keys.dtype} and {keys.shape[2]}; use another "
            "attention backend"
        )
    if graphs not in ("full", "disabled"):
        raise UnsupportedHostError(
            f"FASA captures whole decode steps in CUDA graphs, got {graphs!r}; start with "
            "--cuda-graph-backend-decode full or disabled"
        )
    require_capability(config.label_dtype, torch.cuda.get_device_capability(keys.device))


def _require_served_on_cpu(runner: Any) -> None:
    """Refuse what SGLang's own attention in plain torch computes wrongly or not at all."""
    if isinstance(runner.token_to_kv_pool, SWAKVPool):
        raise UnsupportedHostError(
            "SGLang's attention for CPUs does not read the separate KV pool of sliding windows; "
            "start with --disable-hybrid-swa-memory"
        )
    if served_model(runner.model_config).has_sink_logits:
        raise UnsupportedHostError(
            "SGLang's attention for CPUs has no attention sinks, which this model needs; serve it "
            "on a GPU"
        )


def require_capability(label_dtype: str, capability: tuple[int, int]) -> None:
    """Refuse a label format that the GPU cannot convert in hardware.

    Args:
        label_dtype: A key of ``LABEL_FORMATS``.
        capability: The GPU's CUDA compute capability, (major, minor).

    Raises:
        UnsupportedHostError: The GPU is too old; names a format that it supports.
    """
    needed = LABEL_FORMATS[label_dtype].min_capability
    if capability >= needed:
        return
    others = [name for name, fmt in LABEL_FORMATS.items() if fmt.min_capability <= capability]
    way_out = (
        f"set label_dtype to {' or '.join(map(repr, others))} in the server's fasa settings"
        if others
        else "use another attention backend"
    )
    raise UnsupportedHostError(
        f"{label_dtype} labels need a GPU of compute capability {needed[0]}.{needed[1]} or higher, "
        f"got {capability[0]}.{capability[1]}; {way_out}"
    )


def missing_hooks() -> list[str]:
    """Hook targets that SGLang could not patch, each with the reason.

    SGLang logs such a failure and starts anyway.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    from fasa_sglang.backend.hooks import HOOKS

    targets = [hook.target for hook in HOOKS if hook.target not in HookRegistry._patched]
    return [f"{target} ({_import_failure(target)})" for target in targets]


def _import_failure(target: str) -> str:
    """Why a target's module cannot be imported, which SGLang's own message hides."""
    module = target
    while "." in module:
        module = module.rpartition(".")[0]
        try:
            if find_spec(module) is None:
                continue
        except ModuleNotFoundError:  # a class, or inside a module that cannot be imported
            continue
        try:
            import_module(module)
        except ImportError as error:
            return str(error)
        break
    return "not found"


def _require_hooks() -> None:
    missing = missing_hooks()
    if missing:
        raise UnsupportedHostError(
            f"FASA cannot hook {', '.join(missing)} in SGLang {sglang_version}; use "
            f"{SUPPORTED_VERSIONS} with all packages it needs, and see fasa doctor"
        )
