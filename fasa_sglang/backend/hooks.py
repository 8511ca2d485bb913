"""The table of SGLang functions that FASA hooks; each row says why that place.

The hooks are installed in every process that loads plugins. They have no effect unless the server
runs the ``fasa`` backend. Their code is in the modules that the functions are imported from.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.plugins.hook_registry import HookType

from fasa_sglang.backend import (
    admission,
    api,
    engine_calibration,
    exact_prefix,
    prefill_backend,
    pruner,
    reports,
    served,
    served_model,
    sink_models,
    sizing,
    step,
)
from fasa_sglang.backend.attention import base, graphs
from fasa_sglang.backend.host import (
    CHECKS_BODIES,
    CHECKS_MODELS,
    EXACT_LEN_METHOD,
    SWA_CAP_CONFIGURATOR,
)
from fasa_sglang.hook import Hook
from fasa_sglang.names import BACKEND_NAME


def refuse_triton(original: Callable[[str], bool], backend: str) -> bool:
    """Keep SGLang from launching Triton on a CPU; until 0.5.20 it decides by the backend's name."""
    from sglang.srt.platforms import current_platform

    on_cpu = current_platform.device_type == "cpu"
    return original(backend) and not (backend == BACKEND_NAME and on_cpu)


_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor"
_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_CONFIGURATORS = "sglang.srt.model_executor.pool_configurator"
_POOL = f"{_CONFIGURATORS}.DefaultPoolConfigurator"
_WINDOW_POOLS = f"{_CONFIGURATORS}.HybridSWAPoolConfigurator"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_SETUP = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup"
_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_OPENAI = "sglang.srt.entrypoints.openai"
_CHAT = f"{_OPENAI}.serving_chat.OpenAIServingChat"
_COMPLETIONS = f"{_OPENAI}.serving_completions.OpenAIServingCompletion"
_RESPONSES = f"{_OPENAI}.serving_responses.OpenAIServingResponses"
_ANTHROPIC = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing"
_OLLAMA = "sglang.srt.entrypoints.ollama.serving.OllamaServing"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
_BEFORE, _AROUND, _AFTER = HookType.BEFORE, HookType.AROUND, HookType.AFTER

HOOKS: tuple[Hook, ...] = (
    # Settings, in the process that launches the others and holds the tokenizer.
    Hook(
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        served.launch_with_fixed_settings,
        _AROUND,
        "every other process is started inside it and inherits its environment",
    ),
    Hook(
        f"{_TOKENIZER}.__init__",
        served.read_settings_at_start,
        _AFTER,
        "the earliest place in the tokenizer process that has SGLang's model config",
    ),
    # Requests and replies, in the HTTP and tokenizer process.
    Hook(
        f"{_TOKENIZER}.generate_request",
        reports.serve_with_reports,
        _AROUND,
        "the last place that sees the HTTP body, whose unknown fields SGLang drops, and the first "
        "that knows to which choice a reply belongs",
    ),
    Hook(
        f"{_TOKENIZER}._create_tokenized_object",
        api.check_request,
        _BEFORE,
        "every request passes here before it is scheduled, and an error becomes HTTP 400",
    ),
    Hook(
        f"{_OPENAI}.serving_base.OpenAIServingBase.handle_request",
        reports.explain_refusal,
        _AROUND,
        "builds the error replies of chat and completions",
    ),
    Hook(
        f"{_CHAT}._convert_to_internal_request",
        api.lift_openai_field,
        _BEFORE,
        "before a stream has begun, so that a refusal is HTTP 400 and not a broken stream",
    ),
    Hook(
        f"{_CHAT}._build_chat_response",
        reports.add_report,
        _AFTER,
        "has both the response with its metadata field and the replies",
    ),
    Hook(
        f"{_CHAT}._generate_chat_stream",
        reports.add_report_to_stream,
        _AROUND,
        "builds the usage chunk that ends a stream",
    ),
    Hook(
        f"{_COMPLETIONS}._convert_to_internal_request",
        api.lift_openai_field,
        _BEFORE,
        "as for chat",
    ),
    Hook(
        f"{_COMPLETIONS}._build_completion_response",
        reports.add_report,
        _AFTER,
        "as for chat",
    ),
    Hook(
        f"{_COMPLETIONS}._generate_completion_stream",
        reports.add_report_to_stream,
        _AROUND,
        "as for chat",
    ),
    Hook(
        f"{_RESPONSES}.create_responses",
        reports.report_response,
        _AROUND,
        "called before a stream has begun, and returns the stream",
    ),
    Hook(
        f"{_RESPONSES}.responses_full_generator",
        reports.report_full_response,
        _AROUND,
        "builds the response of requests in the foreground and in the background",
    ),
    Hook(
        f"{_ANTHROPIC}.handle_messages",
        reports.refuse_message,
        _AROUND,
        "has the answer to a request whose conversion failed, which is HTTP 500 in SGLang 0.5.17",
    ),
    Hook(
        f"{_ANTHROPIC}._handle_non_streaming",
        reports.report_message,
        _AROUND,
        "builds the reply, whose SGLang class has no field for a report",
    ),
    Hook(
        f"{_ANTHROPIC}._generate_anthropic_stream",
        reports.report_message_stream,
        _AROUND,
        "builds the events of a stream",
    ),
    Hook(
        f"{_OLLAMA}.handle_chat",
        api.check_body,
        _BEFORE,
        "SGLang answers errors that this route raises later with HTTP 500",
    ),
    Hook(
        f"{_OLLAMA}.handle_generate",
        api.check_body,
        _BEFORE,
        "as for handle_chat",
    ),
    # Steps, in the scheduler.
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        base.plan_step,
        _AFTER,
        "has the requests of the batch and the runner's backend, just before a forward pass",
    ),
    Hook(
        f"{_RUNNER}.forward",
        prefill_backend.label_prefilled_keys,
        _AFTER,
        "all layers have stored their keys, whichever backend prefills",
    ),
    Hook(
        f"{_RESULTS}.SchedulerBatchResultProcessor._maybe_collect_customized_info",
        step.count_step,
        _AFTER,
        "called once per accepted token, before the reply is sent",
    ),
    # Pruning.
    Hook(
        f"{_BATCH}.maybe_evict_swa",
        pruner.prune_requests,
        _BEFORE,
        "SGLang frees sliding-window slots here: after a step's bookkeeping and before the next "
        "step allocates",
    ),
    Hook(
        f"{_BATCH}._get_decode_retraction_order",
        pruner.retract_pruned_last,
        _AFTER,
        "returns the order in which running requests lose their slots",
    ),
    Hook(
        f"{_BATCH}.retract_decode",
        admission.abort_unrecoverable_retractions,
        _AFTER,
        "returns the retracted requests before they are queued again",
    ),
    Hook(
        f"{_ADDER}.add_one_req",
        admission.cap_admission_reservation,
        _AROUND,
        "decides whether a waiting request fits, by its max_new_tokens",
    ),
    Hook(
        f"{_ADDER}._get_running_request_total_token_offset",
        admission.cap_running_reservation,
        _AFTER,
        "returns the slots that stay reserved for a running request",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        admission.allow_replies_beyond_pool,
        _AROUND,
        "caps max_new_tokens by the size of the pool",
    ),
    Hook(
        f"{_CHECKER}._get_total_uncached_sizes",
        pruner.subtract_tombstones,
        _AFTER,
        "SGLang's leak check adds up the slots of running requests by their lengths",
    ),
    # Memory.
    Hook(
        f"{_RUNNER}.alloc_memory_pool",
        served_model.survey_model,
        _BEFORE,
        "the model is loaded, and its layers tell how many bytes of labels a token needs",
    ),
    Hook(
        f"{_POOL}._compute_cell_size",
        sizing.reserve_label_bytes,
        _AROUND,
        "returns the bytes per token by which SGLang sizes its KV pool",
    ),
    Hook(
        f"{_POOL}.calculate_pool_sizes",
        sizing.reserve_scratch,
        _BEFORE,
        "receives the bytes that the pool may use",
    ),
    Hook(
        f"{_WINDOW_POOLS}.__init__",
        sizing.reserve_label_bytes_beside_windows,
        _AFTER,
        "computes the bytes per token by which SGLang sizes two pools",
    ),
    Hook(
        f"{_WINDOW_POOLS}.calculate_pool_sizes",
        sizing.reserve_scratch,
        _BEFORE,
        "as for the pool of a model without sliding windows",
    ),
    Hook(
        f"{_CONFIGURATORS}.{SWA_CAP_CONFIGURATOR}.calculate_pool_sizes",
        sizing.reserve_scratch,
        _BEFORE,
        "replaces the method of its base class",
    ),
    # CUDA graphs.
    Hook(
        f"{_SETUP}.capture_prefill_graph",
        engine_calibration.calibrate_at_start,
        _BEFORE,
        "everything is ready but the graphs, whose steps depend on which layers select",
    ),
    Hook(
        f"{_GRAPHS}._capture_one_stream",
        graphs.capture_every_variant,
        _AROUND,
        "captures all batch sizes of one stream",
    ),
    Hook(
        f"{_GRAPHS}._make_graph_key",
        graphs.name_variant,
        _AFTER,
        "makes the key under which a graph is stored and looked up",
    ),
    # The radix tree.
    Hook(
        f"sglang.srt.managers.schedule_batch.Req.{EXACT_LEN_METHOD}",
        exact_prefix.limit_to_exact_prefix,
        _AFTER,
        "returns how much of an ending request the tree may keep",
    ),
    Hook(
        "sglang.srt.mem_cache.common.release_kv_cache",
        exact_prefix.keep_recurrent_state_exact,
        _BEFORE,
        "every ending request passes here before the tree takes its recurrent state",
    ),
    Hook(
        "sglang.srt.mem_cache.common._release_overallocated_kv_indices",
        exact_prefix.free_inexact_tail,
        _AROUND,
        "frees the slots of an ending request that the tree did not take",
    ),
    # The CPU platform.
    Hook(
        "sglang.srt.utils.common.support_triton",
        refuse_triton,
        _AROUND,
        "decides by the backend's name whether SGLang launches its Triton helpers",
    ),
)
if CHECKS_MODELS:
    HOOKS += (
        Hook(
            "sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments",
            sink_models.accept_backend_with_sinks,
            _AROUND,
            "refuses attention backends for gpt-oss by a list of names",
        ),
    )
if CHECKS_BODIES:
    HOOKS += (
        Hook(
            "sglang.srt.entrypoints.api_contract.generate_contract_error",
            api.allow_in_contract,
            _AROUND,
            "refuses bodies of /generate with unknown fields in sampling_params",
        ),
    )
