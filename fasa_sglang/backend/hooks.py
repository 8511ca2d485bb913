"""The places of SGLang that FASA hooks. Inert unless the server runs the ``fasa`` backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from fasa_sglang.backend.base import FasaBackend
from fasa_sglang.backend.host import (
    KEPT_LEN_METHOD,
    fasa_config,
    free_row_tail,
    graph_scratch_bytes,
    heads_of_rank,
    load_dominant_fcs,
    uses_fasa,
)
from fasa_sglang.backend.label_cache import label_bytes_per_token
from fasa_sglang.backend.step import REQ_ATTRIBUTE, launch_step
from fasa_sglang.errors import RequestError
from fasa_sglang.requests import parse_request

META_KEY = "fasa"


@dataclass(frozen=True)
class Hook:
    """One hook: SGLang's dotted name, our function, and how it attaches."""

    target: str
    function: Callable[..., Any]
    kind: HookType


def check_request(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse a malformed ``custom_params`` in the tokenizer process, before it is scheduled.

    A ``ValueError`` here becomes HTTP 400; nothing was scheduled and the server goes on.
    """
    custom_params = (getattr(obj, "sampling_params", None) or {}).get("custom_params")
    if custom_params is None:
        return
    if not isinstance(custom_params, dict):
        raise RequestError(f"custom_params must be an object, got {custom_params!r:.80}")
    if not uses_fasa(manager.server_args):
        if custom_params.get("fasa") not in (None, False):
            raise RequestError(
                "this server does not run FASA, so it cannot serve a request with fasa; start it "
                "with --attention-backend fasa"
            )
        return
    parse_request(custom_params, fasa_config(manager.model_config), prompt_len=0)


def plan_step(result: Any, cls: Any, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """Tell the backend what each lane of the coming forward pass does."""
    backend = getattr(model_runner, "attn_backend", None)
    if isinstance(backend, FasaBackend):
        backend.lanes = launch_step(batch, backend.config, backend.num_layers)


def count_step(result: Any, processor: Any, i: int, req: Any, *args: Any, **kwargs: Any) -> None:
    """Count an accepted token's step; leave a finished request's report for its reply.

    SGLang sends the entries of the output tokens that a message carries. The last message carries
    at least one, and until then there is nothing to send, which would cost time at every step.
    """
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None:
        return
    state.count()
    if req.finished():
        reports = {META_KEY: [state.report()] * len(req.output_ids)}
        req.customized_info = {**(req.customized_info or {}), **reports}


def fold_report(
    original: Callable[..., AsyncGenerator[dict[str, Any], None]], *args: Any, **kwargs: Any
) -> AsyncIterator[dict[str, Any]]:
    """Turn the entries of a reply's tokens into one report.

    SGLang looks the request up when this is called, not when it is first awaited, so the
    original has to be called at once.
    """
    return _fold(original(*args, **kwargs))


async def _fold(replies: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(replies):
        async for reply in replies:
            entries = reply.get("meta_info", {}).get(META_KEY)
            if isinstance(entries, list):
                report = next((entry for entry in reversed(entries) if entry), None)
                reply = {**reply, "meta_info": {**reply["meta_info"], META_KEY: report}}
            yield reply


def keep_exact_prefix(result: int, req: Any) -> int:
    """Let the radix tree keep only keys and values that a dense run would have.

    What a sparse step computed belongs to that request's approximation. In the tree another
    request, dense ones included, would read it as if it were exact.
    """
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None or state.exact_len is None:
        return result
    return min(result, state.exact_len)


def free_inexact_tail(
    original: Callable[..., None], req: Any, start: int, end: int, tree_cache: Any
) -> None:
    """Free what ``keep_exact_prefix`` withheld; SGLang asserts that there is no such tail."""
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None or state.exact_len is None:
        original(req, start, end, tree_cache)
    elif start < end:
        free_row_tail(req, start, end, tree_cache)


def reserve_label_bytes(
    original: Callable[..., int], configurator: Any, kvc: Any, num_layers: int
) -> int:
    """Add the label cache to the bytes one token costs, so that the pool leaves room for it."""
    cell_size = original(configurator, kvc, num_layers)
    if not uses_fasa(kvc.server_args):
        return cell_size
    _, num_fcs = load_dominant_fcs(kvc.model_config)
    _, num_kv_heads = heads_of_rank(kvc.model_config)
    config = fasa_config(kvc.model_config)
    configurator.fasa_scratch_bytes = graph_scratch_bytes(kvc.model_config, config)
    return cell_size + label_bytes_per_token(num_layers, num_kv_heads, num_fcs, config.label_dtype)


def reserve_scratch(
    configurator: Any, available_bytes: int, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Keep the buffers of captured sparse steps out of the memory the pool divides up."""
    reserved = getattr(configurator, "fasa_scratch_bytes", 0)
    return (configurator, available_bytes - reserved, *args), kwargs


def capture_every_variant(original: Callable[..., None], runner: Any, *args: Any) -> None:
    """Capture all batch sizes once for each thing that a decode batch may do.

    SGLang 0.5.20 has a place for such variants, 0.5.17 has none; this works in both.
    """
    backend = getattr(runner, "attn_backend", None)
    if not isinstance(backend, FasaBackend) or not backend.variants:
        original(runner, *args)
        return
    for variant in backend.variants:
        backend.capturing = variant
        original(runner, *args)
    backend.capturing = None


def name_variant(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep the graphs of one batch size apart, when captured and when replayed."""
    backend = getattr(runner, "attn_backend", None)
    if not isinstance(backend, FasaBackend) or not backend.variants:
        return result
    label = "-".join(filter(None, (result.variant_label, backend.variant.value)))
    return replace(result, variant_label=label)


def refuse_triton(original: Callable[[str], bool], backend: str) -> bool:
    """Keep SGLang's Triton helpers off the CPU, as for its own torch backend (until 0.5.20)."""
    from sglang.srt.platforms import current_platform

    from fasa_sglang.plugin import BACKEND_NAME

    on_cpu = current_platform.device_type == "cpu"
    return original(backend) and not (backend == BACKEND_NAME and on_cpu)


_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor"
_POOL = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

HOOKS = (
    Hook(f"{_TOKENIZER}._create_tokenized_object", check_request, HookType.BEFORE),
    Hook(f"{_TOKENIZER}._wait_one_response", fold_report, HookType.AROUND),
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        plan_step,
        HookType.AFTER,
    ),
    Hook(
        f"{_RESULTS}.SchedulerBatchResultProcessor._maybe_collect_customized_info",
        count_step,
        HookType.AFTER,
    ),
    Hook(f"{_POOL}._compute_cell_size", reserve_label_bytes, HookType.AROUND),
    Hook(f"{_POOL}.calculate_pool_sizes", reserve_scratch, HookType.BEFORE),
    Hook(f"{_GRAPHS}._capture_one_stream", capture_every_variant, HookType.AROUND),
    Hook(f"{_GRAPHS}._make_graph_key", name_variant, HookType.AFTER),
    Hook(
        f"sglang.srt.managers.schedule_batch.Req.{KEPT_LEN_METHOD}",
        keep_exact_prefix,
        HookType.AFTER,
    ),
    Hook(
        "sglang.srt.mem_cache.common._release_overallocated_kv_indices",
        free_inexact_tail,
        HookType.AROUND,
    ),
    Hook("sglang.srt.utils.common.support_triton", refuse_triton, HookType.AROUND),
)
