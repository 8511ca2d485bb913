"""Batches of programs and their right replies, to train a model on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fasa_sglang.workloads.eval.worksheet.generator import MIN_VARIABLES
from fasa_sglang.workloads.eval.worksheet.program import Program
from fasa_sglang.workloads.eval.worksheet.prompt import draw_for_length, prompt_ids, reply_ids

# A program of so many variables has look-backs of up to about 1600 tokens.
MAX_VARIABLES = 128
# About what a line takes; a program should have two rounds or more.
LINE_TOKENS = 22
# Target of a token that is not trained on.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Programs whose replies have about the same length.

    Args:
        ids: Prompts and replies, int64 ``[B, L]``, padded at the end.
        targets: The next token at each position, int64 ``[B, L]``; ``IGNORED`` before the reply
            and in the padding.
    """

    ids: torch.Tensor
    targets: torch.Tensor


def draw_batch(seed: str, tokenizer: Any, reply_len: int, num_tokens: int) -> Batch:
    """Draw programs of random sizes; equal arguments give an equal batch.

    Args:
        seed: Seed of the programs. Those of evaluations are numbers, so a word keeps them apart.
        tokenizer: The model's tokenizer.
        reply_len: Largest length of a reply, in tokens.
        num_tokens: Drawing ends with the program that reaches this number of tokens.
    """
    sequences: list[tuple[list[int], list[int]]] = []
    drawn = 0
    while drawn < num_tokens:
        program = draw_sized(f"{seed}-{len(sequences)}", tokenizer, reply_len)
        pair = prompt_ids(tokenizer, program), reply_ids(tokenizer, program)
        sequences.append(pair)
        drawn += sum(map(len, pair))
    return pad(sequences)


def draw_sized(seed: str, tokenizer: Any, reply_len: int) -> Program:
    """A program of any number of variables with which the reply has room for two rounds."""
    most = max(MIN_VARIABLES, min(MAX_VARIABLES, reply_len // (2 * LINE_TOKENS)))
    num_variables = random.Random(f"{seed}-size").randint(MIN_VARIABLES, most)
    return draw_for_length(seed, tokenizer, num_variables, reply_len)


def pad(sequences: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """A batch of pairs of prompt and reply."""
    length = max(len(prompt) + len(reply) for prompt, reply in sequences)
    # With causal attention, no token attends to the padding after it, whatever it is.
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    targets = torch.full_like(ids, IGNORED)
    for row, (prompt, reply) in enumerate(sequences):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(reply)
    return Batch(ids, targets)
