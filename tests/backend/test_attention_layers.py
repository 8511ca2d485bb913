"""The attention layers of models that SGLang runs by transformers' code."""

from __future__ import annotations

import pytest
from sglang.srt.layers.radix_attention import RadixAttention
from torch.nn import Module, ModuleList

from fasa_sglang.backend.attention_layers import attention_layers
from fasa_sglang.errors import UnsupportedModelError

HEAD_DIM, NUM_LAYERS = 64, 2


class Attention(Module):
    """An attention module of transformers knows its layer, and whether it is causal."""

    def __init__(self, layer_idx: int, is_causal: bool) -> None:
        super().__init__()
        self.layer_idx, self.is_causal = layer_idx, is_causal


class Model(Module):
    """As SGLang keeps a model of transformers: the attention lies in a dict outside the modules."""

    def __init__(self, numbers: range) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        super().__init__()
        config = LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4)
        self.language_model = Module()
        self.language_model.rotary_emb = LlamaRotaryEmbedding(config)
        self.language_model.layers = ModuleList(Attention(i, True) for i in numbers)
        # Its modules count their layers from 0, too.
        self.vision_model = ModuleList(Attention(i, False) for i in range(NUM_LAYERS))
        self.attention_instances = {
            i: RadixAttention(4, HEAD_DIM, 1.0, 2, i, sliding_window_size=64 if i else -1)
            for i in range(NUM_LAYERS)
        }


def test_attention_layers_of_a_model_of_transformers_are_found() -> None:
    first, second = attention_layers(Model(range(NUM_LAYERS)))
    assert (first.layer, first.attends_to_all) == (0, True)
    assert first.rotation is not None
    assert len(first.rotation.pairs) == HEAD_DIM // 2
    assert (second.layer, second.attends_to_all, second.rotation) == (1, False, None)


def test_attention_layers_without_modules_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="the modules of layers 1 of Model"):
        attention_layers(Model(range(1)))
