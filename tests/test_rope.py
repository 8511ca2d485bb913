"""Frequency chunks are the pairs that RoPE rotates, for every model type in the table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from fasa_sglang.calibration.capture import capture_qk
from fasa_sglang.errors import UnsupportedModelError
from fasa_sglang.rope import ROPE_INTERLEAVED, RopeLayout, rope_layout_from_config

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
# Further config values of a small model, where the type's defaults are those of a large one.
EXTRA: dict[str, dict[str, Any]] = {
    "gpt_neox": {"num_key_value_heads": 2, "rotary_pct": 0.25},
    "glm4_moe": {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "mixtral": {"num_local_experts": 2},
    "phi": {"num_key_value_heads": 2},
    "phi3": {"partial_rotary_factor": 0.5, "num_key_value_heads": 2},
    "qwen2_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def captured(config: Any, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Post-RoPE q and k of one repeated token, whose rows differ only by their rotation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode(), capture_qk(lambda layer, q, k, scale: seen.append((q, k))):
        model(input_ids=torch.full((1, length), 3))
    return seen[0]


def contribution(q: torch.Tensor, k: torch.Tensor, dims: torch.Tensor, t: int, j: int) -> Any:
    """Contribution of each chunk to q_t · k_j, ``[num_chunks]``."""
    return (q[0, t].double()[dims] * k[0, j].double()[dims]).sum(dim=-1)


@pytest.mark.parametrize("model_type", sorted(ROPE_INTERLEAVED))
def test_chunk_dims_contribution_depends_on_relative_position_only(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **{**SMALL, **EXTRA.get(model_type, {})})
    layout = rope_layout_from_config(config)
    q, k = captured(config)
    assert layout.head_dim == q.shape[-1]
    dims = layout.chunk_dims()
    near = contribution(q, k, dims, 9, 4)
    torch.testing.assert_close(contribution(q, k, dims, 37, 32), near, rtol=1e-4, atol=1e-5)
    # It does change with the distance, so the line above can fail.
    assert (contribution(q, k, dims, 37, 4) - near).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "glm4"])
def test_chunk_dims_of_the_other_layout_depend_on_absolute_position(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **{**SMALL, **EXTRA.get(model_type, {})})
    wrong = rope_layout_from_config(config, interleaved=not ROPE_INTERLEAVED[model_type])
    q, k = captured(config)
    dims = wrong.chunk_dims()
    shift = contribution(q, k, dims, 37, 32) - contribution(q, k, dims, 9, 4)
    assert shift.abs().max() > 1e-2


def test_rope_layout_with_llama3_scaling_keeps_the_pairs() -> None:
    config = AutoConfig.for_model("llama", **SMALL, rope_parameters=LLAMA3_SCALING)
    layout = rope_layout_from_config(config)
    assert layout.theta == 500000.0
    assert layout.scaling["rope_type"] == "llama3"
    assert layout.scaling["factor"] == 8.0
    q, k = captured(config)
    dims = layout.chunk_dims()
    torch.testing.assert_close(
        contribution(q, k, dims, 37, 32), contribution(q, k, dims, 9, 4), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model_type", "rotary_dim"), [("glm4", 16), ("phi", 16), ("gpt_neox", 8), ("qwen3", 32)]
)
def test_rope_layout_of_a_partial_rotary_model_has_its_rotary_dim(
    model_type: str, rotary_dim: int
) -> None:
    config = AutoConfig.for_model(model_type, **{**SMALL, **EXTRA.get(model_type, {})})
    assert rope_layout_from_config(config).rotary_dim == rotary_dim


@given(half_rotary=st.integers(1, 32), half_rest=st.integers(0, 32), interleaved=st.booleans())
def test_chunk_dims_cover_every_head_dim_once(
    half_rotary: int, half_rest: int, interleaved: bool
) -> None:
    rotary_dim = 2 * half_rotary
    layout = RopeLayout(rotary_dim + 2 * half_rest, rotary_dim, interleaved, 1e4)
    dims = layout.chunk_dims()
    assert dims.shape == (layout.num_chunks, 2)
    assert dims.flatten().sort().values.tolist() == list(range(layout.head_dim))
    assert dims[:half_rotary].max() < rotary_dim


def test_rope_layout_with_old_config_keys_is_unchanged() -> None:
    """SGLang writes ``rope_scaling`` with an extra ``type`` into configs that it loads."""
    config = AutoConfig.for_model("llama", **SMALL)
    plain = rope_layout_from_config(config)
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "default", "type": "default"}
    assert rope_layout_from_config(config) == plain


def test_rope_layout_after_sglang_built_the_model_is_unchanged() -> None:
    """SGLang adds ``original_max_position_embeddings`` to ``rope_parameters`` of such a config."""
    config = AutoConfig.for_model(
        "phi3", **{**SMALL, **EXTRA["phi3"]}, original_max_position_embeddings=128
    )
    plain = rope_layout_from_config(config)
    assert plain.scaling == {}
    config.rope_parameters["original_max_position_embeddings"] = 128
    assert rope_layout_from_config(config) == plain


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(AutoConfig.for_model("gpt2"), "no rotary position embedding", id="no-rope"),
        pytest.param(
            AutoConfig.for_model("gptj", rope_theta=1e4),
            'fasa serve with --settings \'."rope_layout"',
            id="unknown",
        ),
        pytest.param(
            SimpleNamespace(model_type="llama", rope_theta=1e4, head_dim=33),
            "even head_dim",
            id="odd",
        ),
    ],
)
def test_rope_layout_of_an_unsupported_model_is_refused(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        rope_layout_from_config(config)
