"""Families with experts, whose layers all attend to all tokens."""

from __future__ import annotations

from fasa_sglang.workloads.models.families.family import FALLBACK, Family

# All experts are used: a choice would turn a rounding difference into another token.
EXPERTS = 2
CHOICE = {"num_experts_per_tok": EXPERTS, "moe_intermediate_size": 128}

FAMILIES = (
    Family(
        "qwen2_moe",
        {**CHOICE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 128},
        ends={"cpu": "0 active drivers"},
    ),
    Family("qwen3_moe", {**CHOICE, "num_experts": EXPERTS}),
    Family("mixtral", {"num_experts_per_tok": EXPERTS, "num_local_experts": EXPERTS}),
    Family(
        "glm4_moe",
        {
            **CHOICE,
            "n_routed_experts": EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    Family(
        "granitemoe",
        {"num_experts_per_tok": EXPERTS, "num_local_experts": EXPERTS},
        omitted=("head_dim",),
    ),
    Family(
        "dots1",
        {
            **CHOICE,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        note=FALLBACK,
    ),
    Family(
        "minimax_m2",
        {
            "num_experts_per_tok": EXPERTS,
            "num_local_experts": EXPERTS,
            "rotary_dim": 32,
            "scoring_func": "sigmoid",
            "use_qk_norm": True,
            # On a GPU, SGLang has no other sigmoid gate.
            "use_routing_bias": True,
        },
        ends={"cpu": "x1.is_cuda"},
    ),
    Family(
        "olmoe",
        {"num_experts_per_tok": EXPERTS, "num_experts": EXPERTS},
        omitted=("head_dim", "num_key_value_heads"),
    ),
    Family(
        "ernie4_5_moe",
        {
            "moe_k": EXPERTS,
            "moe_num_experts": EXPERTS,
            "moe_intermediate_size": 128,
            "moe_num_shared_experts": 1,
        },
        ends={"cpu": "Index tensor must have the same number of dimensions"},
        omitted=("head_dim",),
    ),
    Family(
        "hy_v3",
        {
            **CHOICE,
            "num_experts": EXPERTS,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "route_norm": True,
            "qk_norm": True,
        },
    ),
    Family(
        "granitemoehybrid",
        {
            "num_experts_per_tok": EXPERTS,
            "num_local_experts": EXPERTS,
            "layer_types": ["attention"] * 3,
            "position_embedding_type": "rope",
        },
        omitted=("head_dim",),
    ),
)
