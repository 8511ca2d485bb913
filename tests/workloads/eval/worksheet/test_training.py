"""Training lowers the loss, writes an adapter, and continues with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.worksheet.batches import IGNORED, Batch, draw_batch, pad
from fasa_sglang.workloads.eval.worksheet.held_out import held_out_accuracy, reply_spans
from fasa_sglang.workloads.eval.worksheet.loss import batch_loss, right_tokens
from fasa_sglang.workloads.eval.worksheet.training import (
    Training,
    learning_rate_factor,
    train,
)
from fasa_sglang.workloads.models.byte_tokenizer import write_byte_tokenizer
from fasa_sglang.workloads.models.lora import fold
from fasa_sglang.workloads.models.pretrained import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return load_tokenizer(str(folder))


@pytest.fixture
def model(tokenizer: Any) -> Any:
    """Two layers with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        # With the usual weights, no adapter can make the logits of so few dims differ.
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config)


def training(adapter: Path, **changes: Any) -> Training:
    small = {"lengths": (700, 800), "batch_tokens": 1500, "learning_rate": 2e-2, "max_steps": 25}
    return Training(minutes=5, adapter=adapter, base="base", **{**small, **changes})


def test_train_lowers_the_loss_and_folds_into_the_same_model(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    batch = draw_batch("test", tokenizer, 800, 1500)
    before = batch_loss(model, batch).item()
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapters = train(model, tokenizer, training(tmp_path / "adapter"))
    model.eval()
    after = batch_loss(model, batch).item()
    assert after < 0.8 * before
    fold(model, adapters)
    assert batch_loss(model, batch).item() == pytest.approx(after, rel=1e-3)
    assert model.state_dict().keys() == frozen.keys()
    changed = {
        name for name, weight in frozen.items() if not model.state_dict()[name].equal(weight)
    }
    assert changed == {f"{name}.weight" for name in adapters}


def test_train_continues_with_the_adapter_that_exists(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from copy import deepcopy

    path = tmp_path / "adapter"
    first = train(deepcopy(model), tokenizer, training(path, max_steps=5))
    same = train(deepcopy(model), tokenizer, training(path, max_steps=0))
    for name, layer in same.items():
        assert layer.up.equal(first[name].up.bfloat16().float())
    with pytest.raises(FasaError, match="other layers or ranks than this training"):
        train(deepcopy(model), tokenizer, training(path, attention_rank=3))


def test_adapter_of_the_default_ranks_is_small_enough() -> None:
    """The model is Qwen2.5-Coder-0.5B; a shipped adapter may have 10 MB."""
    hidden, key_value, inner, layers = 896, 128, 4864, 24
    attention = 2 * (hidden + hidden) + 2 * (hidden + key_value)
    mlp = 3 * (hidden + inner)
    parameters = layers * (Training.attention_rank * attention + Training.mlp_rank * mlp)
    assert 9e6 < 2 * parameters < 9.9e6


def test_adapter_file_has_bfloat16_factors_of_every_projection(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    train(model, tokenizer, training(tmp_path / "adapter", max_steps=1))
    tensors = load_file(tmp_path / "adapter")
    assert len(tensors) == 2 * 7 * 2 and {each.dtype for each in tensors.values()} == {
        torch.bfloat16
    }
    assert tensors["model.layers.1.mlp.down_proj.down"].shape == (Training.mlp_rank, 64)
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_batch_trains_on_the_reply_only() -> None:
    batch = pad([([1, 2, 3], [4, 5]), ([1], [6, 7, 8, 9])])
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5], [1, 6, 7, 8, 9]]
    i = IGNORED
    assert batch.targets.tolist() == [[i, i, 4, 5, i], [6, 7, 8, 9, i]]


def test_padding_changes_nothing(model: Any) -> None:
    short, long = ([1, 2, 3], [4, 5]), ([1] * 9, [7] * 20)
    alone, padded = pad([short]), pad([short, long])
    own = Batch(padded.ids[:1], padded.targets[:1])
    torch.testing.assert_close(batch_loss(model, own), batch_loss(model, alone))


def test_right_tokens_are_those_that_the_model_would_generate(model: Any) -> None:
    prompt = [5, 6, 7]
    reply: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            reply.append(int(model(torch.tensor([prompt + reply])).logits[0, -1].argmax()))
    assert right_tokens(model, pad([(prompt, reply)])).all()
    wrong = [*reply[:3], (reply[3] + 1) % 100, *reply[4:]]
    right = right_tokens(model, pad([(prompt, wrong)]))[0]
    assert right[:5].all() and not right[5]


def test_held_out_accuracy_of_a_random_model_is_0(model: Any, tokenizer: Any) -> None:
    shares = held_out_accuracy(model, tokenizer, 700, 2)
    assert shares["replies"] == 0 and shares["lines"] < 0.2 and shares["tokens"] < 0.2


def test_reply_spans_are_the_tokens_of_each_part(tokenizer: Any) -> None:
    text = "01.1 oak=10 + key=25 -> zoo=35\n01.2 zoo=35 -> oak=35\nanswer: key=25"
    ids = tokenizer(text).input_ids
    parts = {
        kind: [tokenizer.decode(ids[start:end]) for start, end in spans]
        for kind, spans in reply_spans(tokenizer, text).items()
    }
    assert parts == {
        "lines": text.splitlines(keepends=True),
        "looked_up": ["10", "25", "35", "25"],
        "results": ["35", "35"],
    }


def test_learning_rate_rises_and_falls() -> None:
    factors = [learning_rate_factor(share / 100) for share in range(101)]
    peak = factors.index(max(factors))
    assert factors[peak] == 1 and 0 < factors[0] < 0.1 and factors[-1] == pytest.approx(0)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
