"""Families in which only some layers attend to all tokens, or none as FASA needs it."""

from __future__ import annotations

from fasa_sglang.workloads.models.families.experts import CHOICE, EXPERTS
from fasa_sglang.workloads.models.families.family import Family

# Layer 1 attends to all tokens; a window of less than most prompts in the others.
WINDOWS = {
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}

FAMILIES = (
    Family("gemma2", {**WINDOWS, "query_pre_attn_scalar": 64}, selecting=(1,)),
    Family("gemma3_text", {**WINDOWS, "query_pre_attn_scalar": 64}, selecting=(1,)),
    Family("cohere2", WINDOWS, selecting=(1,)),
    Family("olmo3", WINDOWS, omitted=("head_dim",), selecting=(1,)),
    Family(
        "qwen2 with windows",
        {**WINDOWS, "use_sliding_window": True},
        omitted=("head_dim",),
        selecting=(1,),
    ),
    Family("exaone4 with windows", WINDOWS, selecting=(1,)),
    Family(
        "llama4_text",
        {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"]},
        selecting=(1,),
    ),
    Family(
        "gpt_oss",
        {**WINDOWS, "num_experts_per_tok": EXPERTS, "num_local_experts": EXPERTS},
        selecting=(1,),
    ),
    Family(
        "qwen3_next",
        {**LINEAR, **CHOICE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 128},
        selecting=(1,),
    ),
    Family("qwen3_5_text", LINEAR, selecting=(1,)),
    Family(
        "deepseek_v3",
        {
            **CHOICE,
            "n_routed_experts": EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
)
