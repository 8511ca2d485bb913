"""Families in which only some layers attend to all tokens, or none as FASA needs it."""

from __future__ import annotations

from fasa_sglang.workloads.models.families.dense import PLAIN_ROPE, TIED, YARN_SCALING
from fasa_sglang.workloads.models.families.experts import CHOICE, EXPERTS
from fasa_sglang.workloads.models.families.family import Family

# A window of less than most prompts in the first layer.
WINDOWS = {
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}

FAMILIES = (
    Family(
        "gemma2",
        {**WINDOWS, **TIED, "query_pre_attn_scalar": 64, "hidden_act": "gelu_pytorch_tanh"},
        selecting=(1, 2),
    ),
    Family("gemma3_text", {**WINDOWS, **TIED, "query_pre_attn_scalar": 64}, selecting=(1, 2)),
    Family("cohere2", {**WINDOWS, **TIED}, selecting=(1, 2)),
    Family(
        "olmo3",
        {**WINDOWS, "rope_parameters": {kind: PLAIN_ROPE for kind in set(WINDOWS["layer_types"])}},
        omitted=("head_dim",),
        selecting=(1, 2),
    ),
    Family("qwen2 with windows", {**WINDOWS, "use_sliding_window": True}, omitted=("head_dim",)),
    Family("exaone4 with windows", WINDOWS, selecting=(1, 2)),
    # Every fourth layer attends to all tokens, without RoPE.
    Family("llama4_text", {"num_hidden_layers": 4}),
    Family(
        "gpt_oss",
        {**WINDOWS, "num_experts_per_tok": EXPERTS, "num_local_experts": EXPERTS},
        selecting=(1, 2),
    ),
    Family(
        "qwen3_next",
        {**LINEAR, **CHOICE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 128},
        selecting=(1, 2),
    ),
    Family("qwen3_5_text", LINEAR, selecting=(1, 2)),
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
    ),
)
