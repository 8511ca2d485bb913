"""The agent loop, its benchmark, and the examples."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fasa_sglang.cli import main
from fasa_sglang.workloads.agent_loop import Answer, Tools
from fasa_sglang.workloads.bench.agent import summary
from fasa_sglang.workloads.serving.transcript import Transcript

FASA = shutil.which("fasa", path=Path(sys.executable).parent)
EXAMPLES = Path(__file__).parents[3] / "examples"


def test_tools_call_accepts_exactly_one_known_name() -> None:
    tools = Tools(0)
    assert tools.codes == Tools(0).codes != Tools(1).codes
    assert tools.call('Sure.\nlookup("amber door")') == (
        "amber door",
        f"Result: the code of the amber door is {tools.codes['amber door']}.",
    )
    assert tools.call("lookup('The Amber Door')")[0] == "amber door"
    assert tools.call('lookup("grey door")')[1] == "Error: there is nothing named grey door."
    assert tools.call("amber door")[0] is None


def test_summary_counts_turns_and_right_answers() -> None:
    def answer(turn: int, kind: str, correct: bool, cached: int | None) -> Answer:
        return Answer(0, turn, kind, "", correct, 0.5, 0.01, 100, cached, 5, 0.25)

    answers = [
        answer(0, "call", True, 0),
        answer(0, "answer", False, 90),
        answer(1, "call", True, 80),
        answer(1, "answer", True, 30),
    ]
    figures = summary(answers, seconds=4.0)
    assert figures["turns_per_s"] == 0.5
    assert figures["cache_hit"] == 0.5
    assert figures["calls_right"] == 1
    assert figures["answers_right"] == 0.5
    assert figures["ttft_ms"] == 500
    assert figures["tpot_ms"] == pytest.approx(10)
    assert figures["reply_ms"] == pytest.approx(540)
    assert figures["kv_read_ratio"] == 0.25
    unknown = summary([answer(0, kind, True, None) for kind in ("call", "answer")], 1.0)
    assert unknown["cache_hit"] is None


def test_transcript_copies_share_tokens_and_grow_independently(tiny_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    start = Transcript(tokenizer, "Be brief.")
    shared = start.tokens(reply=False)
    first, second = start.copy(), start.copy()
    first.add("user", "one")
    second.add("user", "two")
    assert tokenizer.decode(first.tokens()) == "<system>Be brief.\n<user>one\n<assistant>"
    before = second.tokens()
    assert before[: len(shared)] == shared
    second.add("assistant", "2")
    second.add("user", "three")
    after = second.tokens()
    assert after[: len(before)] == before
    assert tokenizer.decode(after) == (
        "<system>Be brief.\n<user>two\n<assistant>2\n<user>three\n<assistant>"
    )
    # A template that rewrites earlier messages is tokenised from the start.
    tokenizer.chat_template = "{{ messages[-1].content }}"
    assert tokenizer.decode(second.tokens()) == "three"
    assert Transcript(None, "x").tokens() is None


@pytest.mark.thorough
def test_bench_agent_answers_with_fasa_as_without(smollm2_path: Path, tmp_path: Path) -> None:
    """SmolLM2 can call the tool and read the code from its output."""
    report = tmp_path / "report.json"
    command = [FASA, "bench", "agent", "--model", str(smollm2_path), "--json", str(report)]
    command += ["--branches", "2", "--turns", "1", "--prefix-tokens", "500", "--tokenize", "client"]
    done = subprocess.run(
        [*command, "--fasa", '{"budget": 384}'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(report.read_text())["runs"]
    baseline, off, on = runs.values()
    assert list(runs)[1:] == ["fasa off", "fasa on"]
    assert next(iter(runs)).endswith(" (SGLang's default)")
    assert baseline["calls_right"] == 1
    for figure in ("calls_right", "answers_right"):
        assert on[figure] == off[figure] == baseline[figure]
    assert baseline["kv_read_ratio"] is None
    assert off["kv_read_ratio"] == 1 > on["kv_read_ratio"]
    # The second branch reuses the system prompt of the first one, unless both arrive together.
    assert off["cache_hit"] > 0.3
    assert [len(run["answers"]) for run in runs.values()] == [4, 4, 4]


def test_bench_agent_with_a_running_server_and_a_baseline_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", "agent", "--base-url", "http://127.0.0.1:9", "--baseline", "auto"]
    assert main(command) == 1
    assert "--baseline does not apply to the running server" in capsys.readouterr().err


def test_examples_run_as_documented(server: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n" * 60)
    for command in (
        [sys.executable, str(EXAMPLES / "program.py"), "--base-url", server, str(text)],
        [sys.executable, str(EXAMPLES / "openai_client.py"), "--base-url", server, str(text), "?"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "'sparse_steps': " in done.stdout
    flags = ["--branches", "3", "--turns", "1", "--prefix-tokens", "300"]
    for fasa, code, message in (
        ('{"budget": 512}', 0, "3 branches, 1 turns each"),
        ('{"budget": 2048}', 1, "max_budget = 1024 tokens, got 2048"),
    ):
        done = subprocess.run(
            ["bash", str(EXAMPLES / "agent_loop.sh"), server, *flags, "--fasa", fasa],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={"PATH": f"{Path(FASA).parent}:/usr/bin:/bin", "HOME": str(Path.home())},
        )
        assert done.returncode == code, done.stderr[-3000:]
        assert message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
