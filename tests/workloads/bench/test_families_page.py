"""What trials of families say when a server ends, and the page of all trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fasa_sglang.workloads.bench.families.processes import ended
from fasa_sglang.workloads.bench.families.report import load_trials, save_trials, write_page
from fasa_sglang.workloads.bench.families.trial import NEW_TOKENS, Trial
from fasa_sglang.workloads.models.families.family import Family
from fasa_sglang.workloads.models.families.table import FAMILIES

DOCS = Path(__file__).parents[3] / "docs"
SERVED = Trial(
    sglang="0.5.23",
    num_layers=3,
    selecting=(0, 1, 2),
    same_when_covering=(24, 24, 24),
    sparse_steps=(NEW_TOKENS - 1,) * 3,
    read_when_small=(0.8, 0.2, 0.1),
    same_in_transformers=(24, 24, 24),
    distinct=(20, 20, 20),
)
TRACEBACK = """\
[12:00:01] Scheduler hit an exception: Traceback (most recent call last):
  File "model.py", line 7, in load
    assert weight.is_cuda
           ^^^^^^^^^^^^^^
"""


@pytest.mark.parametrize(
    ("log", "sentence", "refused"),
    [
        (f"{TRACEBACK}AssertionError\n\nSIGQUIT received\n", "assert weight.is_cuda", False),
        (f"{TRACEBACK}AssertionError: on a CPU\n", "on a CPU", False),
        (f"{TRACEBACK}fasa_sglang.errors.UnsupportedModelError: it caps\n", "it caps", True),
        ("ValueError: first\nfasa_sglang.errors.FasaError: last\n", "last", True),
        ("killed\n", "killed", False),
        ("", "no output", False),
    ],
)
def test_ended_of_a_log_is_its_last_error(log: str, sentence: str, refused: bool) -> None:
    trial = ended(log)
    assert (trial.sentence, trial.refused) == (sentence, refused)


@pytest.mark.parametrize(
    ("trial", "problem"),
    [
        (SERVED, None),
        (replace(SERVED, sentence="out of memory"), "the server ended: out of memory"),
        (replace(SERVED, differences=("step 3",)), "step 3"),
        (replace(SERVED, same_when_covering=(3, 2, 4)), r"only \(3, 2, 4\) steps agree"),
        (replace(SERVED, selecting=(1,)), r"layers \(1,\) select, expected \(0, 1, 2\)"),
        (replace(SERVED, sparse_steps=(0, 0, 0)), "expected 23 in each reply"),
        (replace(SERVED, read_when_small=(1, 1, 1)), "a small budget reads 100% of the tokens"),
        (replace(SERVED, distinct=(20, 1, 20)), "compare little"),
    ],
)
def test_problems_of_a_served_family_name_what_differs(trial: Trial, problem: str | None) -> None:
    found = trial.problems(Family("llama"), "cpu")
    assert len(found) == (problem is not None)
    if problem is not None:
        with pytest.raises(ValueError, match=problem):
            raise ValueError(found[0])


def test_problems_of_a_refused_family_are_other_sentences_and_service() -> None:
    family = Family("gemma2", ends={"cpu": "caps them"})
    assert family.needs_gpu
    refused = Trial(sglang="0.5.23", sentence="layer 1 caps them at 50", refused=True)
    assert refused.problems(family, "cpu") == []
    assert replace(refused, refused=False, fails_alone=True).problems(family, "cpu") == []
    assert replace(refused, refused=False).problems(family, "cpu") == ["SGLang alone serves it"]
    assert len(replace(SERVED, sentence="out of memory").problems(family, "cpu")) == 1
    assert len(SERVED.problems(family, "cpu")) == 1
    assert SERVED.problems(family, "cuda") == []


def test_page_tells_devices_apart_where_they_differ(tmp_path: Path) -> None:
    ended_on_cpu = Trial(sglang="0.5.23", sentence="a | b", refused=True)
    save_trials(tmp_path / "models", "cpu", {"llama": SERVED, "gpt_oss": ended_on_cpu})
    save_trials(tmp_path / "models", "cuda", {"gpt_oss": SERVED, "llama": SERVED})
    assert load_trials(tmp_path / "models", "cpu")["llama"] == SERVED
    write_page(tmp_path / "models")
    page = (tmp_path / "models.md").read_text()
    assert "| `llama` | 3 of 3 | served | random weights on a CPU, random weights on a GPU" in page
    assert "| on a CPU refused: “a \\| b”; on a GPU served |" in page


def test_docs_show_the_stored_outcomes(tmp_path: Path) -> None:
    stored = load_trials(DOCS / "models", "cpu")
    assert set(stored) == set(FAMILIES), "run scripts/models.sh"
    for device in ("cpu", "cuda"):
        save_trials(tmp_path / "models", device, load_trials(DOCS / "models", device))
    write_page(tmp_path / "models")
    assert (tmp_path / "models.md").read_text() == (DOCS / "models.md").read_text()
    problems = {name: trial.problems(FAMILIES[name], "cpu") for name, trial in stored.items()}
    assert {name: found for name, found in problems.items() if found} == {}
