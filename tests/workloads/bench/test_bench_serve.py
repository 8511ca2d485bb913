"""``fasa bench serve`` and what it compares with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fasa_sglang.cli import main
from fasa_sglang.own_command import own_command
from fasa_sglang.workloads.bench.baseline import baseline_label, parse_baselines
from fasa_sglang.workloads.bench.memory import label_share
from fasa_sglang.workloads.bench.serve_timing import Row, add_speedups
from fasa_sglang.workloads.serving.engine import COMPARABLE_BACKEND, engine_arguments


def test_parse_baselines_drops_duplicates_and_refuses_fasa() -> None:
    assert parse_baselines("auto, flashinfer,auto") == ["auto", "flashinfer"]
    for text in ("", "auto,", "auto,fasa"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected SGLang's attention"):
            parse_baselines(text)


def test_baseline_label_of_auto_names_the_resolved_backend() -> None:
    assert baseline_label("auto", {"attention_backend": "fa3"}) == "fa3 (SGLang's default)"
    assert baseline_label("flashinfer", {"attention_backend": "flashinfer"}) == "flashinfer"


def test_engine_arguments_with_baseline_auto_leave_the_backend_to_sglang() -> None:
    assert "attention_backend" not in engine_arguments("m", None, baseline="auto")
    assert engine_arguments("m", None, baseline="triton")["attention_backend"] == "triton"
    comparable = engine_arguments("m", None)["attention_backend"]
    assert comparable in COMPARABLE_BACKEND.values()
    assert engine_arguments("m", {})["attention_backend"] == "fasa"


def test_add_speedups_compares_every_row_with_every_baseline() -> None:
    def row(engine: str, fasa: bool, tpot_ms: float, batch_size: int = 1) -> Row:
        return Row(batch_size, 1024, engine, fasa, 1.0, tpot_ms, 1.0, None)

    rows = [
        row("fa3", False, 8.0),
        row("flashinfer", False, 10.0),
        row("fasa", False, 10.0),
        row("fasa", True, 5.0),
    ]
    rows += [row(each.engine, each.fasa, 2 * each.tpot_ms, batch_size=8) for each in rows]
    add_speedups(rows, ["fa3", "flashinfer"])
    expected = [
        {"fa3": 1.0, "flashinfer": 1.25},
        {"fa3": 0.8, "flashinfer": 1.0},
        {"fa3": 0.8, "flashinfer": 1.0},
        {"fa3": 1.6, "flashinfer": 2.0},
    ]
    assert [each.speedups for each in rows] == expected * 2


def test_label_share_is_the_labels_part_of_a_token() -> None:
    from transformers import LlamaConfig

    from fasa_sglang.workloads.models.random_weights import config_shape
    from fasa_sglang.workloads.models.shapes import SHAPES

    shape = config_shape(LlamaConfig(**SHAPES["llama3.1-8b"]))
    # 31 of 32 layers select; 64 label bytes beside 512 bytes of key and value per head.
    assert label_share(shape) == pytest.approx(31 / 32 * 64 / 512)


@pytest.mark.thorough
def test_bench_serve_reports_every_engine_against_every_baseline(tmp_path: Path) -> None:
    """SGLang chooses its backend by itself; the report says which one it was."""
    import subprocess

    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    command = own_command("bench", "serve", "--shape", "smollm2", "--cases", "2x96")
    command += ["--output-tokens", "8", "--baseline", "auto", "--budget", "64"]
    done = subprocess.run(
        [*command, "--json", str(report), "--plot", str(plot)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    payload = json.loads(report.read_text())
    label = payload["baselines"]["auto"]
    assert label.endswith(" (SGLang's default)")
    rows = [(row["engine"], row["fasa"]) for row in payload["rows"]]
    assert rows == [(label, False), ("fasa", False), ("fasa", True)]
    for row in payload["rows"]:
        assert list(row["speedups"]) == [label] and row["tpot_ms"] > 0
    assert payload["rows"][0]["kv_read_ratio"] is None
    assert f"x {label}" in done.stdout.replace("\n", " ") and plot.stat().st_size


def test_bench_serve_with_bad_cases_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--cases", "8 by 1024"]) == 1
    assert "--cases must be BATCHxTOKENS,..., got '8 by 1024'" in capsys.readouterr().err


def test_bench_memory_with_an_invalid_budget_is_refused_before_it_starts_anything(
    smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The baselines used to run first, for minutes."""
    command = ["bench", "memory", "--shape", "smollm2", "--budget", "48", "--prune-budget", "48"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "prune_budget must be at least" in error and "requests in" not in error
