"""What FASA does not work with: every refusal at start, with its reason, in one place."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from fasa_sglang.backend.host import attention_backends, decode_graph_settings
from fasa_sglang.backend.served import fasa_config, serves_on_flashinfer
from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.names import BACKEND_NAME
from fasa_sglang.ops.label_format import LABEL_FORMATS

HEAD_DIMS = (64, 128, 256)

# Server flag: (the value that FASA works with, why others do not work).
FLAGS: dict[str, tuple[Any, str]] = {
    "speculative_algorithm": (None, "verification reads several tokens per step"),
    "enable_mixed_chunk": (False, "decode steps inside a prefill batch would run dense"),
    "enable_hierarchical_cache": (False, "it loads keys that have no labels"),
    "disaggregation_mode": ("null", "transferred keys have no labels"),
    "enable_two_batch_overlap": (False, "it splits the batch behind the backend"),
    "dcp_size": (1, "each rank holds a part of a request's keys"),
    "attn_cp_size": (1, "each rank holds a part of a request's keys"),
    "enable_pdmux": (False, "it splits the batch behind the backend"),
    "tokenizer_worker_num": (1, "SGLang loads no plugins in additional tokenizer workers"),
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
    for name, (supported, reason) in FLAGS.items():
        value = getattr(args, name, supported)
        if value not in (None, supported):
            raise UnsupportedHostError(
                f"FASA does not work with {name}={value!r} ({reason}); expected {supported!r}, or "
                "another attention backend"
            )
    prefill, decode = attention_backends(args)
    if (prefill, decode) != (BACKEND_NAME, BACKEND_NAME):
        raise UnsupportedHostError(
            "FASA must serve prefill, which writes labels, and decode, which reads them; got "
            f"{prefill!r} for prefill and {decode!r} for decode; start with --attention-backend "
            "fasa alone"
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
    if serves_on_flashinfer(runner):
        _require_supported_gpu(runner, keys)


def _require_supported_gpu(runner: Any, keys: torch.Tensor) -> None:
    config = fasa_config(runner.model_config)
    graphs = decode_graph_settings().backend
    if config.selector != "fasa" and graphs != "disabled":
        raise UnsupportedHostError(
            f"selector {config.selector!r} ranks in torch and cannot be captured in CUDA graphs; "
            "start with --cuda-graph-backend-decode disabled"
        )
    if keys.dtype not in (torch.float16, torch.bfloat16) or keys.shape[2] not in HEAD_DIMS:
        raise UnsupportedHostError(
            f"FlashInfer attends to float16 or bfloat16 heads of {HEAD_DIMS} dims, got "
            f"{keys.dtype} and {keys.shape[2]}; use another attention backend"
        )
    if graphs not in ("full", "disabled"):
        raise UnsupportedHostError(
            f"FASA captures whole decode steps in CUDA graphs, got {graphs}; start with "
            "--cuda-graph-backend-decode full, or disabled"
        )
    require_capability(config.label_dtype, torch.cuda.get_device_capability(keys.device))


def require_capability(label_dtype: str, capability: tuple[int, int]) -> None:
    """Refuse a label format that the GPU's kernels cannot convert.

    Args:
        label_dtype: A key of ``LABEL_FORMATS``.
        capability: The GPU's CUDA compute capability.

    Raises:
        UnsupportedHostError: Names a format that works there.
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
    """Our targets that SGLang did not patch (it logs and goes on), each with the reason."""
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
        except ModuleNotFoundError:  # a class, or inside a module that cannot be imported
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
