"""Conversations as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def chat_ids(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokenise a conversation up to the point where the model's reply begins.

    Args:
        tokenizer: Hugging Face tokenizer. Without a chat template, the turns are separated by
            blank lines.
        turns: Messages with ``role`` and ``content``.
    """
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(turn["content"] for turn in turns) + "\n").input_ids
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids
