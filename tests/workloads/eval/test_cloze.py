"""Which words cloze asks for, and whether its score is the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.calibration.corpus import default_text, held_out_text
from fasa_sglang.cli import main
from fasa_sglang.workloads.eval.task import Options
from fasa_sglang.workloads.eval.tasks.cloze import Cloze, recurring_words, whole_words
from fasa_sglang.workloads.models.pretrained import load_tokenizer

LENGTH, REPLY = 300, 240


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return load_tokenizer(str(smollm2_path))


def test_whole_words_share_no_token_with_other_text(tokenizer: Any) -> None:
    text = "Lanterns hung in warehouses; parse_known_args2 and L'Aquila's 1234, 5th fog: LANTERNS."
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    words = whole_words(text, encoded.offset_mapping)
    assert [word for _, _, word in words] == [
        "lanterns",
        "hung",
        "warehouses",
        "parse_known_args2",
        "aquila",
        "lanterns",
    ]
    for start, end, word in words:
        assert tokenizer.decode(encoded.input_ids[start:end]).strip().lower() == word
    assert any(end - start > 1 for start, end, _ in words)


def test_recurring_words_are_absent_from_the_prompt_and_far_apart() -> None:
    words = [(0, 1, "prompt"), (10, 12, "reply"), (100, 101, "prompt"), (74, 76, "reply")]
    words += [(200, 202, "reply"), (265, 266, "reply"), (300, 301, "once")]
    words.sort()
    assert recurring_words(words, 5) == [(195, 197, 126), (260, 261, 65)]
    assert recurring_words(words, 11) == [], "the prompt has both words"


def test_samples_whose_encoding_shrinks_still_have_a_prompt(tokenizer: Any) -> None:
    """Encoded again, a piece of this text is a token shorter, which left no prompt at all."""
    options = Options(limit=200, length=LENGTH, seed=0, text=default_text(), max_tokens=LENGTH - 1)
    samples = Cloze().samples(tokenizer, options)
    assert {len(sample.prompt) for sample in samples} == {1}
    for sample in samples:
        forced, words = sample.data
        assert max(end for _, end, _ in words) <= len(forced)
    assert any(len(sample.data[0]) < LENGTH - 1 for sample in samples)


@pytest.mark.thorough
def test_cloze_scores_the_model_densely_and_less_when_pruned(
    tmp_path: Path, smollm2_path: Path, smollm2_calibration: str, tokenizer: Any
) -> None:
    """The expected score comes from one forward pass of transformers over the same tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    code = held_out_text()
    options = Options(limit=1, length=LENGTH, seed=0, text=code, max_tokens=REPLY)
    [sample] = Cloze().samples(tokenizer, options)
    forced, words = sample.data
    ids = torch.tensor([sample.prompt + forced])
    with torch.no_grad():
        best = model(ids).logits[0, len(sample.prompt) - 1 : -1].argmax(dim=-1).tolist()
    right = [(best[start:end] == forced[start:end], gap) for start, end, gap in words]

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
    # In bfloat16, as on a GPU, two words of nearly the same probability may swap ranks.
    rounded = int(torch.cuda.is_available())
    dense, pruned = (json.loads(line)["metrics"] for line in path.read_text().splitlines())
    for n in (64, 128):
        hits = [hit for hit, gap in right if gap > n]
        assert dense[f"over_{n}"] * len(hits) == pytest.approx(sum(hits), abs=rounded + 1e-6)
    assert "over_256" not in dense, "the reply is shorter than that"
    assert not list(path.parent.glob("over_256.png")), "there is nothing to draw"
    lost = (dense["over_64"] - pruned["over_64"]) * len(words)
    assert round(lost) >= 2
