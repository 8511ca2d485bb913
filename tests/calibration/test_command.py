"""``fasa calibrate``: what it writes, and what it refuses before and during the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fasa_sglang.cli import main
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.own_command import own_command

POOL = ("--max-total-tokens", "5000")
SMALL = ("--tokens", "512", "--top-k", "32", "--num-queries", "8")


def test_command_writes_calibration_picture_and_report(
    tiny_path: Path, tiny_calibration: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A second run writes the same bytes; the first one is ``tiny_calibration``."""
    out, report = tmp_path / "tiny.fasa", tmp_path / "report.json"
    arguments = ["calibrate", "--model", str(tiny_path), "--out", str(out), "--num-fcs", "8"]
    assert main([*arguments, *POOL, *SMALL, "--json", str(report)]) == 0
    assert out.read_bytes() == Path(tiny_calibration).read_bytes()
    dominant = DominantFCs.load(out)
    assert dominant.num_fcs == 8
    assert dominant.model.layers == (0, 1)
    assert dominant.provenance["held_out"]["num_fcs"] == [2, 4, 8]
    assert (tmp_path / "tiny.fasa.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(report.read_text())
    assert told == {"files": [str(out), f"{out}.png"], **dominant.provenance}
    assert sorted(tmp_path.iterdir()) == [report, out, tmp_path / "tiny.fasa.png"]
    said = capfd.readouterr()
    assert f"wrote {out} and {out}.png" in said.out
    assert "8 of 16 *" in said.out
    lines = [line for line in said.err.splitlines() if line.startswith("calibration:")]
    assert lines[0] == "calibration: ranking, layer 1 of 2"
    assert lines[-2] == "calibration: judging, layer 2 of 2"
    assert lines[-1].startswith("calibration: done in ") and lines[-1].endswith(f", wrote {out}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--text", "short.txt"),
            "calibration needs 4096 tokens of text, short.txt has 3; give a longer --text or a "
            "smaller --tokens",
        ),
        (
            ("--num-fcs", "17"),
            "num_fcs must be from 1 to the model's 16 frequency chunks, got 17",
        ),
        (
            ("--tokens", "4500"),
            "a calibration over 4500 tokens does not fit the 4096 tokens of the model's context or "
            "of the KV pool; pass a smaller --tokens",
        ),
    ],
    ids=["short text", "too many chunks", "beyond the context"],
)
def test_command_refused_by_the_engine_ends_with_its_sentence(
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    flags: tuple[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Too short.")
    arguments = ["calibrate", str(tiny_path), "--out", "c.fasa"]
    assert main([*arguments, *POOL, *flags]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"fasa calibrate: {tiny_path} could not be calibrated: {message}"
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-fcs", "0"), "num_fcs must be at least 1, got 0"),
        (("--num-fcs", "-1"), "num_fcs must be at least 1, got -1"),
        (("--text", "/no/such/text"), "cannot read the text /no/such/text"),
        (("--max-total-tokenz", "3"), "unrecognized arguments: --max-total-tokenz"),
        (("--attention-backend", "triton"), "this command sets the attention backend itself"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_command_with_a_bad_flag_is_refused_before_the_engine_starts(
    tiny_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    out = str(tmp_path / "c.fasa")
    assert main(["calibrate", str(tiny_path), "--out", out, *flags]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("fasa calibrate: ") and message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["/no/such/model", "no-such-user/no-such-model"])
def test_command_with_a_missing_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["calibrate", "--model", model, "--out", str(tmp_path / "c.fasa")]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fasa calibrate: cannot load the model {model} (")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/proc/c.fasa", "cannot write /proc/c.fasa"),
        ("/no/such/folder/c.fasa", "there is no folder /no/such/folder; create it first"),
        (".", "it is a folder; give the path of a file"),
    ],
)
def test_command_with_an_unwritable_out_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    """The model does not exist, so a message about the path proves that it was checked first."""
    assert main(["calibrate", "--model", "/no/such/model", "--out", out]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_command_with_out_in_a_models_folder_is_refused(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang would load the calibration as weights of the model."""
    out = tiny_path / "fasa.safetensors"
    assert main(["calibrate", "--model", str(tiny_path), "--out", str(out)]) == 1
    assert "is a model's folder (it has a config.json)" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)]
)
def test_command_ended_during_calibration_ends_all_processes_and_leaves_no_files(
    tiny_path: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Only the command gets the signal, also at Ctrl-C: the engine has a session of its own."""
    log, work, out = tmp_path / "log", tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    process = subprocess.Popen(
        own_command("calibrate", str(tiny_path), *POOL, "--out", str(out / "c.fasa")),
        env={**os.environ, "TMPDIR": str(work)},
        stdout=subprocess.DEVNULL,
        stderr=log.open("w"),
    )
    for _ in range(1200):
        if "calibration: ranking, layer 1 of 2" in log.read_text():
            break
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    running = descendants(process.pid)
    assert len(running) >= 2
    assert list(work.iterdir())
    before = log.read_text()
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    for _ in range(100):
        running = [pid for pid in running if Path(f"/proc/{pid}").exists()]
        if not running:
            break
        time.sleep(0.1)
    assert not running
    assert not list(out.iterdir())
    assert not [path for path in work.iterdir() if (path / "text").exists()]
    assert "Traceback" not in log.read_text().removeprefix(before)


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    return [*children, *(below for child in children for below in descendants(child))]
