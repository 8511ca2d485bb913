"""The places of SGLang that FASA hooks. Inert unless the server runs the ``fasa`` backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from fasa_sglang.backend.admission import (
    abort_what_cannot_return,
    hold_no_more,
    keep_max_new_tokens,
    reserve_no_more,
)
from fasa_sglang.backend.api import (
    META_KEY,
    add_report,
    add_report_to_stream,
    allow_in_contract,
    check_request,
    fold_report,
    lift_body_field,
    lift_openai_field,
)
from fasa_sglang.backend.base import FasaBackend
from fasa_sglang.backend.host import (
    CHECKS_BODIES,
    KEPT_LEN_METHOD,
    fasa_config,
    free_row_tail,
    graph_scratch_bytes,
    heads_of_rank,
    load_dominant_fcs,
    uses_fasa,
)
from fasa_sglang.backend.label_cache import label_bytes_per_token
from fasa_sglang.backend.memory import memory_of
from fasa_sglang.backend.step import REQ_ATTRIBUTE, launch_step


@dataclass(frozen=True)
class Hook:
    """One hook: SGLang's dotted name, our function, and how it attaches."""

    target: str
    function: Callable[..., Any]
    kind: HookType


def plan_step(result: Any, cls: Any, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """Tell the backend what each lane of the coming forward pass does."""
    backend = getattr(model_runner, "attn_backend", None)
    if isinstance(backend, FasaBackend):
        backend.lanes = launch_step(batch, backend.config, backend.num_layers, backend.usage)


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
        reports = {META_KEY: [state.finish()] * len(req.output_ids)}
        req.customized_info = {**(req.customized_info or {}), **reports}


def keep_exact_prefix(result: int, req: Any) -> int:
    """Let the radix tree keep only keys and values that a dense run would have.

    What a sparse step computed belongs to that request's approximation. In the tree another
    request, dense ones included, would read it as if it were exact.
    """
    state = getattr(req, REQ_ATTRIBUTE, None)
    if state is None or state.exact_len is None:
        return result
    return min(result, state.exact_len)


def prune_requests(batch: Any, *args: Any, **kwargs: Any) -> None:
    """Before a decode step allocates: free slots of running requests that asked for it."""
    memory = memory_of(batch)
    if memory is not None and batch.forward_mode.is_decode():
        memory.prune(batch)


def retract_pruned_last(result: list[int], reqs: list[Any], *args: Any) -> list[int]:
    """Keep requests that were pruned: prefilled again, they would need all their slots.

    SGLang takes back the last of the list first.
    """

    def pruned(i: int) -> bool:
        state = getattr(reqs[i], REQ_ATTRIBUTE, None)
        return state is not None and state.prune.pruned > 0

    return sorted(result, key=lambda i: not pruned(i))


def leave_out_tombstones(result: tuple[int, int], checker: Any) -> tuple[int, int]:
    """SGLang's check of a busy pool counts what requests hold by their lengths."""
    memory = memory_of(checker.tree_cache)
    if memory is None:
        return result
    return result[0] - memory.tombstones, result[1]


def free_inexact_tail(
    original: Callable[..., None], req: Any, start: int, end: int, tree_cache: Any
) -> None:
    """Free what ``keep_exact_prefix`` withheld; SGLang asserts that there is no such tail."""
    state = getattr(req, REQ_ATTRIBUTE, None)
    memory = memory_of(tree_cache)
    if state is not None and memory is not None:
        memory.forget(req)
    if state is None or state.exact_len is None:
        original(req, start, end, tree_cache)
    elif memory is not None and state.prune.pruned:
        memory.release(req, start, end, tree_cache)
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
_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_POOL = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_OPENAI = "sglang.srt.entrypoints.openai"
_CHAT = f"{_OPENAI}.serving_chat.OpenAIServingChat"
_COMPLETIONS = f"{_OPENAI}.serving_completions.OpenAIServingCompletion"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

HOOKS: tuple[Hook, ...] = (
    Hook(f"{_TOKENIZER}.generate_request", lift_body_field, HookType.BEFORE),
    Hook(f"{_TOKENIZER}._create_tokenized_object", check_request, HookType.BEFORE),
    Hook(f"{_TOKENIZER}._wait_one_response", fold_report, HookType.AROUND),
    Hook(f"{_CHAT}._convert_to_internal_request", lift_openai_field, HookType.BEFORE),
    Hook(f"{_CHAT}._build_chat_response", add_report, HookType.AFTER),
    Hook(f"{_CHAT}._generate_chat_stream", add_report_to_stream, HookType.AROUND),
    Hook(f"{_COMPLETIONS}._convert_to_internal_request", lift_openai_field, HookType.BEFORE),
    Hook(f"{_COMPLETIONS}._build_completion_response", add_report, HookType.AFTER),
    Hook(f"{_COMPLETIONS}._generate_completion_stream", add_report_to_stream, HookType.AROUND),
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
    Hook(f"{_BATCH}.maybe_evict_swa", prune_requests, HookType.BEFORE),
    Hook(f"{_BATCH}._get_decode_retraction_order", retract_pruned_last, HookType.AFTER),
    Hook(f"{_BATCH}.retract_decode", abort_what_cannot_return, HookType.AFTER),
    Hook(f"{_ADDER}.add_one_req", reserve_no_more, HookType.AROUND),
    Hook(f"{_ADDER}._get_running_request_total_token_offset", hold_no_more, HookType.AFTER),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        keep_max_new_tokens,
        HookType.AROUND,
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
        "._get_total_uncached_sizes",
        leave_out_tombstones,
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
if CHECKS_BODIES:
    HOOKS += (
        Hook(
            "sglang.srt.entrypoints.api_contract.generate_contract_error",
            allow_in_contract,
            HookType.AROUND,
        ),
    )
