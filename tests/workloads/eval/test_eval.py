"""``fasa eval`` end to end on a CPU server: what it writes, resumes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.cli import main
from fasa_sglang.own_command import own_command
from fasa_sglang.workloads.eval.settings import Setting, needs_choosing, parse_settings
from fasa_sglang.workloads.eval.tasks.base import Sample, require_room
from fasa_sglang.workloads.serving.server import running_server

# Small: a server of SmolLM2 on a CPU decodes about seven tokens a second.
BUDGET = ["--budgets", "128"]


def evaluate(out: Path, calibration: str, *arguments: str) -> subprocess.Popen[str]:
    command = own_command("eval", *arguments, *BUDGET, "--out", str(out))
    # Else its pool takes half of the memory that is free, beside other tests' servers.
    command += ["--calibration", calibration, "--flags=--max-total-tokens 20000"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )


def summary(out: Path, task: str) -> dict[str, Any]:
    [path] = out.glob(f"{task}-*/summary.json")
    entries = json.loads(path.read_text())["settings"]
    # All but the times.
    return {
        entry["setting"]: {k: v for k, v in entry.items() if k != "tokens_per_s"}
        for entry in entries
    }


@pytest.mark.slow
def test_interrupted_and_resumed_it_gives_the_same_summary(
    tmp_path: Path, smollm2_path: Path, smollm2_calibration: str
) -> None:
    """The first run starts its server and is ended with it, the others use one that runs."""
    asked = ["perplexity", "--limit", "2", "--length", "600", "--max-tokens", "10"]
    asked += ["--selectors", "fasa,streaming"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = evaluate(cut, smollm2_calibration, *asked)
    deadline = time.monotonic() + 600
    while sum(len(path.read_text().splitlines()) for path in cut.glob("*/rows.jsonl")) < 3:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    # As a job manager ends it; the server was once left behind, and held its memory.
    first.terminate()
    said = first.communicate(timeout=300)[0]
    assert first.returncode == 1 and "all samples that came back are kept" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(first.pid, 0)
    [rows] = cut.glob("*/rows.jsonl")
    before = rows.read_text()
    assert 3 <= len(before.splitlines()) < 6
    settings = {"min_seq_len": 0, "selector": "any", "calibration": smollm2_calibration}
    flags = ["--enable-custom-logit-processor", "--max-total-tokens", "20000"]
    with running_server(str(smollm2_path), "--settings", json.dumps(settings), *flags) as url:
        for out in (cut, whole):
            done = evaluate(out, smollm2_calibration, *asked, "--base-url", url)
            said = done.communicate(timeout=900)[0]
            assert done.returncode == 0, said[-3000:]
    assert rows.read_text().startswith(before), "what was there was asked for again"
    expected = summary(whole, "perplexity")
    assert list(expected) == ["dense", "fasa-128", "streaming-128"]
    assert all(entry["samples"] == 2 for entry in expected.values())
    assert expected["dense"]["kl"] == 0
    assert 0 < expected["fasa-128"]["kl"] < expected["streaming-128"]["kl"]
    assert expected["fasa-128"]["kv_read_ratio"] < 0.3
    assert [path.name for path in whole.glob("*/kl.png")] == ["kl.png"]
    # A prompt that was in the prefix cache is summed in another order.
    for setting, entry in summary(cut, "perplexity").items():
        for metric in ("kl", "nll", "top1", "nll_interval", "kv_read_ratio"):
            wanted = pytest.approx(expected[setting][metric], rel=1e-3, abs=1e-6)
            assert entry[metric] == wanted, (setting, metric)


@pytest.mark.slow
def test_agreement_forces_one_continuation_in_all_runs(
    tmp_path: Path, smollm2_path: Path, smollm2_calibration: str
) -> None:
    """Rules of pruning were once compared on what each one's server had drawn for itself."""
    asked = ["agreement", "--limit", "1", "--length", "64", "--max-tokens", "12"]
    # A seed that nothing is kept of.
    asked += ["--temperature", "1", "--ignore-eos", "--seed", str(time.time_ns())]
    settings = {"min_seq_len": 0, "calibration": smollm2_calibration}
    flags = ["--enable-custom-logit-processor", "--max-total-tokens", "20000"]
    with running_server(str(smollm2_path), "--settings", json.dumps(settings), *flags) as url:
        for recent in (8, 16):
            more = ["--base-url", url, "--request", json.dumps({"recent": recent})]
            done = evaluate(tmp_path / str(recent), smollm2_calibration, *asked, *more)
            said = done.communicate(timeout=600)[0]
            assert done.returncode == 0, said[-3000:]
    rows = [
        json.loads(line)
        for path in tmp_path.glob("*/*/rows.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert [row["completion_tokens"] for row in rows] == [12] * 4
    assert len({row["text"] for row in rows}) == 1


@pytest.mark.slow
def test_every_kind_of_task_runs(tmp_path: Path, smollm2_calibration: str) -> None:
    """Ours, sgl-eval's with its runner, and lm-eval's, in one command on one server."""
    tasks = ["needle", "write-once", "agreement", "aime24", "ruler_noise_multikey"]
    small = ["--limit", "1", "--length", "1024", "--max-tokens", "12"]
    small += ["--repetition-penalty", "1.2", "--ignore-eos"]
    done = evaluate(tmp_path, smollm2_calibration, *tasks, *small)
    said = done.communicate(timeout=1500)[0]
    assert done.returncode == 0, said[-3000:]
    metrics = ["accuracy", "accuracy", "top1", "score", "score"]
    for task, metric in zip(tasks, metrics, strict=True):
        found = summary(tmp_path, task)
        assert list(found) == ["dense", "fasa-128"], task
        for entry in found.values():
            assert entry["samples"] == 1 and 0 <= entry[metric] <= 1
        assert found["fasa-128"]["kv_read_ratio"] < found["dense"]["kv_read_ratio"] == 1
    followed = [entry["followed"] for entry in summary(tmp_path, "aime24").values()]
    assert followed[0] == 1 and 0 < followed[1] <= 1
    assert len(list(tmp_path.glob("needle-*/depths-*.png"))) == 2
    keys = ("repetition_penalty", "ignore_eos")
    conditions = [json.loads(path.read_text()) for path in tmp_path.glob("*/conditions.json")]
    sampling = {made["task"]: tuple(map(made.get, keys)) for made in conditions}
    assert sampling == {**dict.fromkeys(tasks, (None, None)), "agreement": (1.2, True)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "--selectors", "best"], "unknown selector 'best', expected fasa, oracle"),
        (["needle", "--budgets", "12,x"], "--budgets must be positive integers, got '12,x'"),
        (["no-such-task"], "unknown task 'no-such-task', expected perplexity, agreement, needle"),
        (["needle", "--model", "/no/such/model"], "/no/such/model"),
        (["needle", "--text", "/no/such/text"], "cannot read the text /no/such/text"),
        (["needle", "--length", "300"], "leave .* for the text around them"),
        (["perplexity", "--length", "10000000"], "the text pydoc_data.topics has"),
        (["perplexity", "--max-tokens", "9999"], "--max-tokens must be from 2 to"),
        (["gsm8k"], "sgl-eval cannot load gsm8k"),
        (["needle", "--base-url", "http://127.0.0.1:9/v1"], "no SGLang server answers at"),
        (["compare", "one"], "compare takes two results folders, got 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    smollm2_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["eval", *arguments, "--limit", "2", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("fasa eval: ") and re.search(message, said), said


def test_samples_over_the_context_are_named() -> None:
    samples = [Sample("short", [1] * 10, 5), Sample("long", [1] * 90, 20)]
    require_room(samples, 110)
    with pytest.raises(Exception, match=r"sample long needs 90 \+ 20 tokens .* holds 100"):
        require_room(samples, 100)


def test_settings_are_dense_and_every_selector_with_every_budget() -> None:
    names = [setting.name for setting in parse_settings("fasa,dense,quest", "64,128")]
    assert names == ["dense", "fasa-64", "fasa-128", "quest-64", "quest-128"]
    assert Setting("dense").fasa(1, {"sink": 0}, choosing=True) is False
    assert Setting("fasa", 64).fasa(1, {"sink": 0}, choosing=False) == {"sink": 0, "budget": 64}
    asked = Setting("quest", 64).fasa(1, {}, choosing=True)
    assert asked == {"budget": 64, "selector": "quest", "seed": 1}
    assert needs_choosing([Setting("dense"), Setting("quest", 64)])
    assert not needs_choosing([Setting("dense"), Setting("fasa", 64)])
