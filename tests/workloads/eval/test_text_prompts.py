"""Prompts cut out of a text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fasa_sglang.calibration.corpus import Text
from fasa_sglang.workloads.eval.task import Options
from fasa_sglang.workloads.eval.text_prompts import text_pieces

BOS, EOS = 1, 2


def tokenizer(template: str) -> Any:
    """A token per digit, and ``template`` around a text."""
    special = [("<s>", BOS), ("</s>", EOS)]
    vocab = {**dict(special), "?": 0} | {str(digit): 10 + digit for digit in range(10)}
    rust = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    rust.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[pair for pair in special if pair[0] in template]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("template", "first"), [("$A", []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS])]
)
def test_text_pieces_begin_as_the_tokenizer_begins_a_text(template: str, first: list[int]) -> None:
    """Gemma's perplexity is an eighth higher without the token before the text."""
    options = Options(limit=3, length=6, seed=0, text=Text("digits", "0123456789" * 2))
    pieces = text_pieces(tokenizer(template), options)
    assert len(pieces) == 3
    for name, piece in pieces:
        start = int(name.removeprefix("at-"))
        assert len(piece) == options.length and piece[: len(first)] == first
        own = piece[len(first) :]
        assert own == [10 + (start + i) % 10 for i in range(len(own))]
