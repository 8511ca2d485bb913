"""Families whose layers all attend to all tokens, without experts."""

from __future__ import annotations

from fasa_sglang.workloads.models.families.family import (
    FALLBACK,
    IGNORED_WINDOW,
    Family,
    everywhere,
)

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN_SCALING = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONGROPE_SCALING = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 32,
    "long_factor": [1.0 + 0.05 * pair for pair in range(32)],
    "original_max_position_embeddings": 512,
}
# SGLang ties the embeddings of these types whatever the config says.
TIED = {"tie_word_embeddings": True}
# Multi-head attention: types without grouped queries.
ONLY_MHA = ("num_key_value_heads", "head_dim")

FAMILIES = (
    Family("llama", {"rope_parameters": LLAMA3_SCALING}, other_runs="real weights (SmolLM2-135M)"),
    Family(
        "qwen2 with YaRN",
        {"rope_parameters": YARN_SCALING},
        omitted=("head_dim",),
        other_runs="real weights without YaRN (Qwen2.5-Coder-0.5B)",
    ),
    Family("qwen3"),
    Family("mistral", {"sliding_window": None}),
    Family("mistral with sliding_window", {"sliding_window": 256}, note=IGNORED_WINDOW),
    Family("ministral3"),
    Family("glm", ends=everywhere("Unsupported TP style 'colwise_gather_output'"), note=FALLBACK),
    Family("glm4"),
    Family("cohere", TIED, omitted=("head_dim",)),
    Family("stablelm", {"partial_rotary_factor": 0.25}, omitted=("head_dim",)),
    Family("phi", {"partial_rotary_factor": 0.5, "n_inner": 256}, omitted=ONLY_MHA),
    Family("phi3", omitted=("head_dim",)),
    Family(
        "phi3 with longrope",
        {"rope_parameters": LONGROPE_SCALING, "original_max_position_embeddings": 512},
        omitted=("head_dim",),
        note="SGLang always uses the long factors",
    ),
    Family("olmo", omitted=ONLY_MHA),
    Family("olmo2", omitted=("head_dim",)),
    Family("granite", omitted=("head_dim",)),
    Family("gpt_neox", omitted=ONLY_MHA, note=FALLBACK),
    Family(
        "gptj",
        {"n_embd": 256, "n_layer": 3, "n_head": 4, "rotary_dim": 32, "n_positions": 1024},
        omitted=ONLY_MHA,
    ),
    Family("ernie4_5", note=FALLBACK),
    Family("seed_oss", note=FALLBACK),
    Family("gemma", TIED),
    Family("starcoder2", omitted=("head_dim",)),
    Family("arcee"),
    Family("apertus", omitted=("head_dim",)),
    Family("persimmon", omitted=ONLY_MHA),
    Family(
        "smollm3",
        {"num_hidden_layers": 4},
        omitted=("head_dim",),
        selecting=(0, 1, 2),
        note=f"{FALLBACK}; every fourth layer has no RoPE",
    ),
    Family(
        "exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 3,
        },
        ends=everywhere("is required for Exaone4ForCausalLM, but got fasa"),
        note="SGLang serves it with three backends only",
    ),
    Family(
        "hunyuan_v1_dense",
        {"use_qk_norm": True},
        ends=everywhere("The expanded size of the tensor"),
    ),
    Family("nemotron", ends=everywhere("'NoneType' object is not subscriptable"), note=FALLBACK),
)
