"""Prompts cut out of a text."""

from __future__ import annotations

from typing import Any

from fasa_sglang.calibration.corpus import Text
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.task import Options


def text_ids(tokenizer: Any, text: Text, min_tokens: int) -> list[int]:
    """The text's token ids.

    Raises:
        FasaError: There are fewer than ``min_tokens``.
    """
    ids = tokenizer(text.content, add_special_tokens=False).input_ids
    if len(ids) < min_tokens:
        raise FasaError(
            f"the text {text.name} has {len(ids)} tokens, expected at least {min_tokens}; give a "
            "longer one with --text, or a smaller --length or --limit"
        )
    return ids


def text_pieces(tokenizer: Any, options: Options) -> list[tuple[str, list[int]]]:
    """Pieces of ``options.length`` tokens spread over the text, with their names.

    They overlap if the text is too short for ``options.limit`` separate pieces. Each begins with
    the token that the tokenizer puts before a text, if there is one.

    Raises:
        FasaError: The text is shorter than one piece.
    """
    ids = text_ids(tokenizer, options.text, options.length + 1)
    # With nothing to tokenize, only special tokens are left; one that ends a text is not wanted.
    first = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
    own = options.length - len(first)
    room = len(ids) - own
    count = min(options.limit, room)
    starts = [i * room // count for i in range(count)]
    return [(f"at-{start}", first + ids[start : start + own]) for start in starts]
