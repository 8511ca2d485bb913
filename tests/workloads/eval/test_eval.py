"""``fasa eval`` end to end on a CPU server: what it writes, resumes and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fasa_sglang.cli import main
from fasa_sglang.own_command import own_command
from fasa_sglang.workloads.eval.sample_task import Sample, require_room
from fasa_sglang.workloads.eval.settings import Setting, needs_choosing, parse_settings
from fasa_sglang.workloads.serving.server import running_server

# Small: a server of SmolLM2 on a CPU decodes about seven tokens a second.
BUDGET = ["--budgets", "128"]
# The default pool would take a third of the memory, next to other tests' servers.
POOL = ["--max-total-tokens", "20000"]


def evaluate(out: Path, *arguments: str, calibration: str | None = None) -> subprocess.Popen[str]:
    """Start ``fasa eval``; with a calibration it starts its own server."""
    command = own_command("eval", *arguments, *BUDGET, "--out", str(out))
    if calibration:
        command += ["--calibration", calibration, f"--flags={' '.join(POOL)}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )


def summary(out: Path, task: str) -> dict[str, Any]:
    """The entries of a task's summary by setting, without times."""
    [path] = out.glob(f"{task}-*/summary.json")
    entries = json.loads(path.read_text())["settings"]
    return {
        entry["setting"]: {k: v for k, v in entry.items() if k != "tokens_per_s"}
        for entry in entries
    }


@pytest.mark.thorough
def test_eval_interrupted_and_continued_gives_the_same_summary(
    tmp_path: Path, smollm2_path: Path, smollm2_calibration: str
) -> None:
    """The first run starts its own server and stops it; the others use a running one."""
    arguments = ["perplexity", "--limit", "2", "--length", "600", "--max-tokens", "10"]
    arguments += ["--selectors", "fasa,streaming"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = evaluate(cut, *arguments, calibration=smollm2_calibration)
    deadline = time.monotonic() + 600
    while sum(len(path.read_text().splitlines()) for path in cut.glob("*/rows.jsonl")) < 3:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    # A job manager sends SIGTERM; the server used to survive it, with its memory.
    server = psutil.Process(first.pid).children(recursive=True)
    first.terminate()
    output = first.communicate(timeout=300)[0]
    assert first.returncode == 1 and "all finished samples are saved" in output
    assert server and not psutil.wait_procs(server, timeout=30)[1]
    [rows] = cut.glob("*/rows.jsonl")
    before = rows.read_text()
    assert 3 <= len(before.splitlines()) < 6
    settings = {"min_seq_len": 0, "selector": "any", "calibration": smollm2_calibration}
    flags = ["--enable-custom-logit-processor", *POOL]
    with running_server(str(smollm2_path), "--settings", json.dumps(settings), *flags) as url:
        for out in (cut, whole):
            process = evaluate(out, *arguments, "--base-url", url)
            output = process.communicate(timeout=900)[0]
            assert process.returncode == 0, output[-3000:]
    assert rows.read_text().startswith(before), "finished samples were decoded again"
    expected = summary(whole, "perplexity")
    assert list(expected) == ["dense", "fasa-128", "streaming-128"]
    assert all(entry["samples"] == 2 for entry in expected.values())
    assert expected["dense"]["kl"] == 0
    assert 0 < expected["fasa-128"]["kl"] < expected["streaming-128"]["kl"]
    assert expected["fasa-128"]["kv_read_ratio"] < 0.3
    assert [path.name for path in whole.glob("*/kl.png")] == ["kl.png"]
    # Sums over a prompt from the prefix cache are in another order.
    for setting, entry in summary(cut, "perplexity").items():
        for metric in ("kl", "nll", "top1", "nll_interval", "kv_read_ratio"):
            target = pytest.approx(expected[setting][metric], rel=1e-3, abs=1e-6)
            assert entry[metric] == target, (setting, metric)


@pytest.mark.thorough
def test_eval_agreement_forces_the_same_continuation_in_all_runs(
    tmp_path: Path, smollm2_path: Path, smollm2_calibration: str
) -> None:
    """Pruning rules used to be compared on continuations that each server sampled for itself."""
    arguments = ["agreement", "--limit", "1", "--length", "64", "--max-tokens", "12"]
    # A seed without a cached continuation.
    arguments += ["--temperature", "1", "--ignore-eos", "--seed", str(time.time_ns())]
    settings = {"min_seq_len": 0, "calibration": smollm2_calibration}
    flags = ["--enable-custom-logit-processor", *POOL]
    with running_server(str(smollm2_path), "--settings", json.dumps(settings), *flags) as url:
        for recent in (8, 16):
            request = ["--base-url", url, "--request", json.dumps({"recent": recent})]
            process = evaluate(tmp_path / str(recent), *arguments, *request)
            output = process.communicate(timeout=600)[0]
            assert process.returncode == 0, output[-3000:]
    rows = [
        json.loads(line)
        for path in tmp_path.glob("*/*/rows.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert [row["completion_tokens"] for row in rows] == [12] * 4
    assert len({row["text"] for row in rows}) == 1


@pytest.mark.slow
def test_eval_runs_every_kind_of_task(tmp_path: Path, smollm2_calibration: str) -> None:
    """Our own tasks, sgl-eval's with its runner, and lm-eval's, in one command on one server."""
    tasks = ["needle", "write-once", "agreement", "agent", "aime24", "ruler_noise_multikey"]
    arguments = ["--limit", "1", "--length", "1024", "--max-tokens", "12"]
    arguments += ["--repetition-penalty", "1.2", "--ignore-eos"]
    process = evaluate(tmp_path, *tasks, *arguments, calibration=smollm2_calibration)
    output = process.communicate(timeout=1500)[0]
    assert process.returncode == 0, output[-3000:]
    metrics = ["accuracy", "accuracy", "top1", "answers", "score", "score"]
    for task, metric in zip(tasks, metrics, strict=True):
        entries = summary(tmp_path, task)
        assert list(entries) == ["dense", "fasa-128"], task
        for entry in entries.values():
            assert entry["samples"] == 1 and 0 <= entry[metric] <= 1
        assert entries["fasa-128"]["kv_read_ratio"] < entries["dense"]["kv_read_ratio"] == 1
    followed = [entry["followed"] for entry in summary(tmp_path, "aime24").values()]
    assert followed[0] == 1 and 0 < followed[1] <= 1
    assert len(list(tmp_path.glob("needle-*/depths-*.png"))) == 2
    conditions = [json.loads(path.read_text()) for path in tmp_path.glob("*/conditions.json")]
    keys = ("repetition_penalty", "ignore_eos")
    sampling = {each["task"]: tuple(map(each.get, keys)) for each in conditions}
    assert sampling == {**dict.fromkeys(tasks, (None, None)), "agreement": (1.2, True)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "--selectors", "best"], "unknown selector 'best', expected fasa, oracle"),
        (["needle", "--budgets", "12,x"], "--budgets must be positive integers, got '12,x'"),
        (["no-such-task"], "unknown task 'no-such-task', expected agent, agreement, cloze, needle"),
        (["needle", "--model", "/no/such/model"], "/no/such/model"),
        (["needle", "--text", "/no/such/text"], "/no/such/text"),
        (["needle", "--length", "300"], "leave .* for the text around them"),
        (["perplexity", "--length", "10000000"], "the text pydoc_data.topics has"),
        (["perplexity", "--max-tokens", "9999"], "--max-tokens must be from 2 to"),
        (["gsm8k"], "sgl-eval cannot load gsm8k"),
        (["needle", "--base-url", "http://127.0.0.1:9/v1"], "no SGLang server answers at"),
        (["needle", "--calibration", "/no/such/file"], "cannot read the calibration /no/such/file"),
        (["needle", "--settings", '{"combine": "x"}'], "combine must be one of nrm, mean, got 'x'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_eval_of_what_cannot_be_measured_is_refused_in_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    smollm2_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["eval", *arguments, "--limit", "2", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fasa eval: ") and re.search(message, error), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "one"], "compare takes two results folders, got 1"),
        (["compare", "a", "b", "--out", "c"], "--out does not apply to fasa eval compare"),
        (["compare", "a", "b", "--model", "m"], "--model does not apply to fasa eval compare"),
        (["pool", "a", "b", "--limit", "3"], "--limit does not apply to fasa eval pool"),
        (["pool", "a", "b", "--ignore-eos"], "--ignore-eos does not apply to fasa eval pool"),
        (["needle", "--min-dense", "0.5"], "--min-dense does not apply to a task"),
        (["needle", "--ignore-eos"], "--ignore-eos does not apply to needle"),
        (["cloze", "needle", "--samples", "2"], "--samples does not apply to cloze, needle"),
        (["needle", "--base-url", "u", "--flags=--tp 2"], "--flags does not apply to the running"),
        (["needle", "--base-url", "u", "--calibration", "f"], "--calibration does not apply"),
        (["needle", "--base-url", "u", "--settings", '{"sink": 1}'], "--settings does not apply"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_eval_with_an_option_that_has_no_effect_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such options used to be ignored."""
    assert main(["eval", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_server_flags_keep_quoted_values_together() -> None:
    from argparse import ArgumentParser

    from fasa_sglang.calibration.corpus import default_text
    from fasa_sglang.workloads.eval import command
    from fasa_sglang.workloads.eval.decode import Run
    from fasa_sglang.workloads.eval.task import Options

    parser = ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["needle", "--flags=--served-model-name 'my model' --tp 2"])
    options = Options(limit=1, length=1, seed=0, text=default_text())
    work = Run("model", None, [Setting("dense")], options, {}, 4)
    flags = command._server_flags(work, args)
    assert flags[-4:] == ["--served-model-name", "my model", "--tp", "2"]


def test_require_room_names_the_sample_that_does_not_fit() -> None:
    samples = [Sample("short", [1] * 10, 5), Sample("long", [1] * 90, 20)]
    require_room(samples, 110)
    with pytest.raises(Exception, match=r"sample long needs 90 \+ 20 tokens .* holds 100"):
        require_room(samples, 100)


def test_parse_settings_combines_every_selector_with_every_budget() -> None:
    names = [setting.name for setting in parse_settings("fasa,dense,quest", "64,128")]
    assert names == ["dense", "fasa-64", "fasa-128", "quest-64", "quest-128"]
    assert Setting("dense").fasa(1, {"sink": 0}, choosing=True) is False
    assert Setting("fasa", 64).fasa(1, {"sink": 0}, choosing=False) == {"sink": 0, "budget": 64}
    chosen = Setting("quest", 64).fasa(1, {}, choosing=True)
    assert chosen == {"budget": 64, "selector": "quest", "seed": 1}
    assert needs_choosing([Setting("dense"), Setting("quest", 64)])
    assert not needs_choosing([Setting("dense"), Setting("fasa", 64)])


@pytest.mark.parametrize("name", ["dense", "fasa-64", "per_head-128", "two-step-256"])
def test_setting_from_name_inverts_name(name: str) -> None:
    assert Setting.from_name(name).name == name
