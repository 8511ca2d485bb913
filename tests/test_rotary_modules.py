"""The rotations of real rotary modules, those of transformers and of SGLang."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fasa_sglang.errors import UnsupportedModelError
from fasa_sglang.rope import Rotation
from fasa_sglang.rotary_modules import rotary_module, rotation_of

HEAD_DIM = 64
POSITIONS = torch.tensor([0, 1, 2, 5, 77, 300])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


class DummyRotary(torch.nn.Module):
    """A module whose class is named as rotary modules are."""


class Block(torch.nn.Module):
    """A module with named children."""

    def __init__(self, **children: torch.nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


@pytest.fixture(scope="module")
def sglang_arguments() -> None:
    """SGLang 0.5.17 builds rotary modules by the arguments of the process's server."""
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy"), role="scheduler")


def test_rotary_module_prefers_the_outermost() -> None:
    """Gemma-3 has one in the model, which is in use, and one in each layer, which is not."""
    outer, inner = DummyRotary(), DummyRotary()
    attention = Block(rotary_emb=inner)
    layer = Block(self_attn=attention)
    model = Block(layers=torch.nn.ModuleList([layer]), rotary_emb=outer)
    assert rotary_module([model, model.layers, layer, attention]) is outer
    assert rotary_module([layer, attention]) is inner


def test_rotary_module_is_found_by_its_class_where_its_name_differs() -> None:
    rotary = DummyRotary()
    attention = Block(proj=torch.nn.Linear(2, 2), rope=rotary)
    assert rotary_module([Block(self_attn=attention), attention]) is rotary


def test_rotary_module_of_another_part_is_not_taken() -> None:
    """A vision encoder beside the layers rotates nothing in them."""
    attention = Block(proj=torch.nn.Linear(2, 2))
    model = Block(visual=Block(rotary_emb=DummyRotary()), self_attn=attention)
    assert rotary_module([model, attention]) is None


def vectors() -> torch.Tensor:
    """A random vector for each of ``POSITIONS``."""
    return torch.randn(len(POSITIONS), HEAD_DIM, generator=torch.Generator().manual_seed(0))


def assert_rotates(rotation: Rotation, rotated: torch.Tensor) -> None:
    """The rotation does to ``vectors`` what a module did to them."""
    rows = zip(POSITIONS.tolist(), vectors().double(), strict=True)
    expected = torch.stack([row @ rotation.matrix(position) for position, row in rows])
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=2e-3)


TITLES = {
    "cohere": "Cohere",
    "ernie4_5": "Ernie4_5",
    "gpt_oss": "GptOss",
    "llama": "Llama",
    "phi": "Phi",
    "qwen2": "Qwen2",
}


def rotary_of_transformers(name: str, **settings: Any) -> tuple[torch.nn.Module, Any]:
    """The rotary module of a model type, and the code that applies it."""
    code = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    title = TITLES[name]
    config = getattr(configs, f"{title}Config")(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, num_hidden_layers=1, **settings
    )
    return getattr(code, f"{title}RotaryEmbedding")(config), code.apply_rotary_pos_emb


@pytest.mark.parametrize(
    ("name", "settings", "rotary_dim"),
    [
        ("llama", {}, 64),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 64),
        ("llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}, 64),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 64),
        # Neighbouring dims are the pairs: the columns of a pair are halves apart, or neighbours.
        ("ernie4_5", {"head_dim": HEAD_DIM}, 64),
        ("cohere", {}, 64),
        (
            "phi",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            32,
        ),
        # Its tables have one column per pair.
        ("gpt_oss", {"head_dim": HEAD_DIM}, 64),
    ],
    ids=["llama", "llama3", "yarn", "qwen2", "ernie", "cohere", "phi", "gpt-oss"],
)
def test_rotation_of_a_module_of_transformers_is_what_it_applies(
    name: str, settings: dict[str, Any], rotary_dim: int
) -> None:
    module, apply = rotary_of_transformers(name, **settings)
    x = vectors()
    cos, sin = module(x[None], POSITIONS[None])
    part = x[None, None, :, :rotary_dim]
    rotated, _ = apply(part, part, cos, sin)
    rotation = rotation_of(module, HEAD_DIM)
    assert 2 * len(rotation.pairs) == rotary_dim
    assert_rotates(rotation, torch.cat((rotated[0, 0], x[:, rotary_dim:]), dim=-1))


def test_rotation_of_gemma3_is_that_of_transformers() -> None:
    """SGLang has a module of its own for it, with tables of cosines and sines."""
    from sglang.srt.models.gemma3_causal import Gemma3RotaryEmbedding
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, head_dim=HEAD_DIM, num_hidden_layers=6
    )
    reference, x = modeling_gemma3.Gemma3RotaryEmbedding(config), vectors()
    rotations = {}
    for kind, parameters in dict(config.rope_parameters).items():
        cos, sin = reference(x[None], POSITIONS[None], kind)
        rotated, _ = modeling_gemma3.apply_rotary_pos_emb(x[None, None], x[None, None], cos, sin)
        config.rope_parameters = parameters
        rotations[kind] = rotation_of(Gemma3RotaryEmbedding(config), HEAD_DIM)
        assert_rotates(rotations[kind], rotated[0, 0])
    full, windows = rotations["full_attention"], rotations["sliding_attention"]
    assert not full.equals(windows), "layers with windows have another base"
    assert rotation_of(reference, HEAD_DIM).equals(full), "only full attention is measured"


PAIRS = {
    "neox": [(i, i + 32) for i in range(32)],
    "interleaved": [(2 * i, 2 * i + 1) for i in range(32)],
    "partial": [(i, i + 16) for i in range(16)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, "neox"),
        ({"is_neox_style": False}, "interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"rope_scaling": LLAMA3}, "neox"),
        ({"rope_scaling": YARN}, "neox"),
    ],
    ids=["neox", "interleaved", "partial", "llama3", "yarn"],
)
@pytest.mark.usefixtures("sglang_arguments")
def test_rotation_of_a_module_of_sglang_is_what_it_applies(
    options: dict[str, Any], layout: str, dtype: torch.dtype
) -> None:
    """Measured in the dtype of the served model, compared in float32."""
    from sglang.srt.layers.rotary_embedding import get_rope

    rotation = rotation_of(get_rope(64, 64, 4096, 10000, dtype=dtype, **options), HEAD_DIM)
    assert list(rotation.pairs) == PAIRS[layout]
    exact = get_rope(64, 64, 4096, 10000, dtype=torch.float32, **options)
    measured = rotation_of(exact, HEAD_DIM)
    assert rotation.equals(measured)
    rotated, _ = exact.forward_native(POSITIONS, vectors(), vectors())
    assert_rotates(measured, rotated)
    if "rope_scaling" not in options:
        assert measured.equals(
            Rotation(HEAD_DIM, rotation.pairs, Rotation.neox(2 * len(rotation.pairs)).angles)
        )


@pytest.mark.usefixtures("sglang_arguments")
@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_rotation_of_scaled_modules_is_the_same_in_sglang_and_transformers(
    scaling: dict[str, Any],
) -> None:
    from sglang.srt.layers.rotary_embedding import get_rope

    theirs, _ = rotary_of_transformers("llama", rope_parameters={**scaling, "rope_theta": 1e4})
    ours = get_rope(64, 64, 4096, 10000, dtype=torch.float32, rope_scaling=scaling)
    assert rotation_of(ours, HEAD_DIM).equals(rotation_of(theirs, HEAD_DIM))


def test_rotation_of_tables_without_their_function_names_the_module() -> None:
    tables = DummyRotary()
    tables.register_buffer("inv_freq", torch.ones(32))
    message = "no apply_rotary_pos_emb beside DummyRotary"
    with pytest.raises(UnsupportedModelError, match=message):
        rotation_of(tables, HEAD_DIM)


class Adding(torch.nn.Module):
    """A module that adds the position to the heads."""

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
        return q + 1e4 * positions[:, None], k


def test_rotation_of_a_module_that_does_not_rotate_names_it() -> None:
    with pytest.raises(UnsupportedModelError, match="Adding of 64 dims does something else"):
        rotation_of(Adding(), HEAD_DIM)
