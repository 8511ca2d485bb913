"""Which words a reply is asked for, and whether the score is the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.calibration.corpus import default_text, held_out_text
from fasa_sglang.cli import main
from fasa_sglang.workloads.eval.tasks.base import Options
from fasa_sglang.workloads.eval.tasks.cloze import Cloze, returned_to, whole_words
from fasa_sglang.workloads.models.shapes import load_tokenizer

LENGTH, REPLY = 300, 240


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return load_tokenizer(str(smollm2_path))


def test_words_are_whole(tokenizer: Any) -> None:
    text = "Lanterns hung in warehouses; parse_known_args2 and L'Aquila's 1234, 5th fog: LANTERNS."
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = whole_words(text, encoded.offset_mapping)
    assert [word for _, _, word in found] == [
        "lanterns",
        "hung",
        "warehouses",
        "parse_known_args2",
        "aquila",
        "lanterns",
    ]
    for start, end, word in found:
        assert tokenizer.decode(encoded.input_ids[start:end]).strip().lower() == word
    assert any(end - start > 1 for start, end, _ in found)


def test_asked_is_what_only_the_reply_said_and_not_lately() -> None:
    words = [(0, 1, "prompt"), (10, 12, "reply"), (100, 101, "prompt"), (74, 76, "reply")]
    words += [(200, 202, "reply"), (265, 266, "reply"), (300, 301, "once")]
    words.sort()
    assert returned_to(words, 5) == [(195, 197, 126), (260, 261, 65)]
    assert returned_to(words, 11) == [], "then the prompt holds both"


def test_a_prompt_of_one_token_stays_one(tokenizer: Any) -> None:
    """Cut anew, a piece of this text has a token less, and its request had no prompt at all."""
    options = Options(200, 1, LENGTH, LENGTH - 1, 0, 0.0, 1.0, False, default_text())
    samples = Cloze("cloze").samples(tokenizer, options)
    assert {len(sample.prompt) for sample in samples} == {1}
    for sample in samples:
        forced, asked = sample.data
        assert max(end for _, end, _ in asked) <= len(forced)
    assert any(len(sample.data[0]) < LENGTH - 1 for sample in samples)


@pytest.mark.slow
def test_dense_gets_what_the_model_gets_and_pruning_loses_some(
    tmp_path: Path, smollm2_path: Path, smollm2_calibration: str, tokenizer: Any
) -> None:
    """The words by transformers, from one forward pass of the same tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    code = held_out_text()
    options = Options(1, 1, LENGTH, REPLY, 0, 0.0, 1.0, False, code)
    [sample] = Cloze("cloze").samples(tokenizer, options)
    forced, asked = sample.data
    ids = torch.tensor([sample.prompt + forced])
    with torch.no_grad():
        best = model(ids).logits[0, len(sample.prompt) - 1 : -1].argmax(dim=-1).tolist()
    right = [(best[start:end] == forced[start:end], gap) for start, end, gap in asked]

    settings = {"prune_interval": 8, "prune_recent": 8, "prune_grace": 8}
    request = {"recent": 4, "prune": "generated", "prune_budget": 24}
    text = tmp_path / "text"
    text.write_text(code.content)
    command = ["eval", "cloze", "--text", str(text), "--limit", "1", "--length", str(LENGTH)]
    command += ["--max-tokens", str(REPLY), "--budgets", "16", "--settings", json.dumps(settings)]
    command += ["--request", json.dumps(request), "--calibration", smollm2_calibration]
    command += ["--flags=--max-total-tokens 20000", "--out", str(tmp_path)]
    assert main(command) == 0
    [path] = tmp_path.glob("cloze-*/rows.jsonl")
    # A GPU computes in bfloat16, which may part two words that are nearly as likely.
    rounded = int(torch.cuda.is_available())
    dense, pruned = (json.loads(line)["metrics"] for line in path.read_text().splitlines())
    for n in (64, 128):
        hits = [hit for hit, gap in right if gap > n]
        assert dense[f"over_{n}"] * len(hits) == pytest.approx(sum(hits), abs=rounded + 1e-6)
    assert "over_256" not in dense, "the reply is shorter"
    assert not list(path.parent.glob("over_256.png")), "there is nothing to draw"
    lost = (dense["over_64"] - pruned["over_64"]) * len(asked)
    assert round(lost) >= 2
