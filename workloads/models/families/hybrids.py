"""Families in which only some layers attend to all tokens, or none as FASA needs it."""

from __future__ import annotations

from fasa_sglang.workloads.models.families.dense import PLAIN_ROPE, TIED, YARN_SCALING
from fasa_sglang.workloads.models.families.experts import CHOICE, EXPERTS
from fasa_sglang.workloads.models.families.family import IGNORED_WINDOW, Family, everywhere

# A window of less than most prompts in the first layer.
WINDOWS = {
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
# The base is the same in all layers, because SGLang reads one alone.
OLMO3_ROPE = dict.fromkeys(("sliding_attention", "full_attention"), PLAIN_ROPE)
# Linear attention in every other layer, in a size that its kernels for GPUs have.
LINEAR = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
GPU_TESTS = "another random model on a GPU (test_gpu_hybrids.py)"
NO_SNAPSHOTS = "requires platform support for Mamba cache state snapshots"

FAMILIES = (
    Family(
        "gemma2",
        {**WINDOWS, **TIED, "query_pre_attn_scalar": 64, "hidden_act": "gelu_pytorch_tanh"},
        ends=everywhere("caps them at 50.0"),
    ),
    Family(
        "gemma3_text",
        {**WINDOWS, **TIED, "query_pre_attn_scalar": 64},
        selecting=(1, 2),
        other_runs=f"real weights (Gemma-3-270M), {GPU_TESTS}",
    ),
    Family(
        "cohere2",
        {**WINDOWS, **TIED},
        ends=everywhere("no layer of Cohere2ForCausalLM rotates its keys"),
        note="layers without a window have no RoPE",
    ),
    Family(
        "olmo3",
        {**WINDOWS, "rope_parameters": OLMO3_ROPE},
        omitted=("head_dim",),
        selecting=(1, 2),
    ),
    Family(
        "qwen2 with windows",
        {**WINDOWS, "use_sliding_window": True},
        omitted=("head_dim",),
        note=IGNORED_WINDOW,
    ),
    Family(
        "exaone4 with windows",
        WINDOWS,
        ends=everywhere("is required for Exaone4ForCausalLM, but got fasa"),
        note="layers without a window have no RoPE",
    ),
    # Every fourth layer attends to all tokens, without RoPE.
    Family(
        "llama4_text",
        {"num_hidden_layers": 4},
        ends={
            "cpu": "none of the 1 such layers of Llama4ForCausalLM has a rotary embedding",
            "cuda": "is required for Llama4 model but got fasa",
        },
        note="layers that attend to all tokens have no RoPE",
    ),
    Family(
        "gpt_oss",
        {**WINDOWS, "num_experts_per_tok": EXPERTS, "num_local_experts": EXPERTS},
        selecting=(1, 2),
        ends={"cpu": "does not read the separate KV pool of sliding windows"},
        other_runs=GPU_TESTS,
    ),
    Family(
        "qwen3_next",
        {**LINEAR, **CHOICE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 128},
        selecting=(1, 3),
        ends={"cpu": NO_SNAPSHOTS},
        other_runs=GPU_TESTS,
    ),
    Family("qwen3_5_text", LINEAR, selecting=(1, 3), ends={"cpu": NO_SNAPSHOTS}),
    Family(
        "qwen3_5_moe_text",
        {**LINEAR, **CHOICE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 128},
        selecting=(1, 3),
        ends={"cpu": NO_SNAPSHOTS},
    ),
    Family(
        "deepseek_v3",
        {
            **CHOICE,
            "n_routed_experts": EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "rope_parameters": YARN_SCALING,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
        ends=everywhere("uses multi-head latent attention"),
    ),
)
