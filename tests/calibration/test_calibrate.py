"""``fasa calibrate``: its results on small models, and its refusals."""

from __future__ import annotations

import copy
import importlib.util
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fasa_sglang.calibration import corpus
from fasa_sglang.calibration.calibrate import calibrate
from fasa_sglang.calibration.capture import capture_qk
from fasa_sglang.calibration.model import load_model, memory_errors_explained
from fasa_sglang.calibration.progress import ProgressLines
from fasa_sglang.calibration.settings import CalibrationSettings
from fasa_sglang.cli import main
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError
from fasa_sglang.output_file import remove_stale_parts

SMALL = CalibrationSettings(tokens=256, top_k=16, num_queries=4)


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Any:
    return load_model(str(tiny_path), "cpu")


def calibrate_tiny(tiny: Any, settings: CalibrationSettings = SMALL) -> DominantFCs:
    model, tokenizer = tiny
    return calibrate(model, tokenizer, corpus.default_text(), corpus.held_out_text(), settings)


def test_capture_qk_passes_every_layer_and_restores_attention(tiny: Any) -> None:
    model, _ = tiny
    ids = torch.arange(10)[None]
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen = []
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with capture_qk(lambda *call: seen.append(call)):
            captured = model(input_ids=ids).logits
    assert torch.equal(plain, captured)
    assert [(layer, tuple(q.shape), tuple(k.shape)) for layer, q, k, _ in seen] == [
        (0, (6, 10, 32), (2, 10, 32)),
        (1, (6, 10, 32), (2, 10, 32)),
    ]
    assert seen[0][3] == pytest.approx(32**-0.5)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_capture_qk_after_an_error_restores_attention(tiny: Any) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError, match="stop"), capture_qk(lambda *call: None):
        raise RuntimeError("stop")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_calibrate_twice_gives_equal_files(tiny: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        calibrate_tiny(tiny).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    calibrate_tiny(tiny, replace(SMALL, seed=1)).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_calibrate_k_statistics_are_those_of_the_keys(tiny: Any) -> None:
    model, tokenizer = tiny
    dominant = calibrate_tiny(tiny)
    ids = tokenizer(corpus.default_text().content[:9999], return_tensors="pt").input_ids[:, :256]
    keys = []
    with torch.inference_mode(), capture_qk(lambda layer, q, k, scale: keys.append(k)):
        model(input_ids=ids)
    torch.testing.assert_close(dominant.k_mean[1], keys[1].mean(dim=1))
    spread = (keys[1] - keys[1].mean(dim=1, keepdim=True)).abs().amax(dim=1)
    torch.testing.assert_close(dominant.k_scale[1], spread)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranker": "magic"}, "ranker must be one of deviation, separation"),
        ({"tokens": 100, "top_k": 256}, r"tokens must be at least 4 \* top_k = 1024, got 100"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSettings(**change)


@pytest.mark.parametrize("num_fcs", [-1, 0, 17, 100])
def test_calibrate_with_a_bad_num_fcs_is_refused(tiny: Any, num_fcs: int) -> None:
    """Zero must not be mistaken for a missing value, which means the default."""
    with pytest.raises(CalibrationError, match=f"16 frequency chunks, got {num_fcs}"):
        calibrate_tiny(tiny, replace(SMALL, num_fcs=num_fcs))


def test_calibrate_beyond_the_context_is_refused(tiny: Any) -> None:
    with pytest.raises(
        CalibrationError, match="5000 tokens does not fit the model's context of 4096"
    ):
        calibrate_tiny(tiny, replace(SMALL, tokens=5000))


def test_command_with_a_short_text_is_refused(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    assert main(["calibrate", "--model", str(tiny_path), "--text", str(short)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "needs 4096 tokens of text, short.txt has" in message
    assert "longer --text or a smaller --tokens" in message


def test_command_with_a_missing_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--model", "/no/such/model"]) == 1
    assert "cannot load the model /no/such/model" in capsys.readouterr().err


SMALL_FLAGS = ("--tokens", "256", "--top-k", "16", "--num-queries", "4")


def test_command_writes_calibration_picture_and_report(
    tiny_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "tiny.fasa", tmp_path / "report.json"
    arguments = ["calibrate", "--model", str(tiny_path), "--out", str(out), "--num-fcs", "3"]
    assert main([*arguments, *SMALL_FLAGS, "--json", str(report)]) == 0
    dominant = DominantFCs.load(out)
    assert dominant.num_fcs == 3
    assert dominant.provenance["held_out"]["num_fcs"] == [2, 3, 4, 8]
    assert (tmp_path / "tiny.fasa.png").read_bytes().startswith(b"\x89PNG")
    assert "text_sha256" in report.read_text()
    assert sorted(tmp_path.iterdir()) == [report, out, tmp_path / "tiny.fasa.png"]
    # Not a terminal, so progress comes in lines that a log file can hold.
    lines = [line for line in capfd.readouterr().err.splitlines() if "calibration:" in line]
    assert lines[0] == "calibration: ranking, layer 1 of 2"
    assert lines[-1] == "calibration: judging, layer 2 of 2"


def test_progress_lines_come_every_few_seconds_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(100, 200))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))
    progress = ProgressLines(interval_sec=5)
    for layer in range(1, 13):
        progress("ranking", layer, 12)
    assert capsys.readouterr().err.splitlines() == [
        "calibration: ranking, layer 1 of 12",
        "calibration: ranking, layer 6 of 12, about 6 s left",
        "calibration: ranking, layer 11 of 12, about 1 s left",
        "calibration: ranking, layer 12 of 12",
    ]


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


def test_command_with_a_full_disk_leaves_no_files(
    tiny_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A limit on file sizes stands in for a full disk, at the calibration and at the picture."""
    out = tmp_path / "c.fasa"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code = main(["calibrate", "--model", str(tiny_path), "--out", str(out), *SMALL_FLAGS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 1
    assert f"cannot write {out} (File too large)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_calibrate_a_short_context_fits_tokens_and_top_k() -> None:
    assert CalibrationSettings().for_context(131072) == CalibrationSettings(tokens=4096, top_k=256)
    assert CalibrationSettings().for_context(2048) == CalibrationSettings(tokens=2048, top_k=256)
    assert CalibrationSettings().for_context(512) == CalibrationSettings(tokens=512, top_k=128)


def test_calibrate_a_zero_padded_head_gives_a_file_that_loads(tiny: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny
    padded = copy.deepcopy(model)
    attention = padded.model.layers[1].self_attn
    with torch.no_grad():
        attention.k_proj.weight[32:] = 0
        attention.q_proj.weight[96:] = 0
    calibrate_tiny((padded, tokenizer)).save(tmp_path / "c.fasa")
    dominant = DominantFCs.load(tmp_path / "c.fasa")
    assert (dominant.k_scale[1, 1] == 1).all()
    assert dominant.ranking[1, 1].tolist() == list(range(16)), "equal chunks keep RoPE's order"
    assert (dominant.k_scale[1, 0] != 1).all()


def test_calibrate_a_model_with_offloaded_layers_gives_the_same_file(
    tiny: Any, tiny_path: Path, tmp_path: Path
) -> None:
    """As where a model is larger than a GPU; the embeddings and a layer are loaded as they run."""
    accelerate = pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_path, attn_implementation="sdpa")
    model = accelerate.disk_offload(model, tmp_path / "weights", execution_device="cpu").eval()
    assert model.get_input_embeddings().weight.device.type == "meta"
    calibrate_tiny((model, tiny[1])).save(tmp_path / "offloaded")
    calibrate_tiny(tiny).save(tmp_path / "plain")
    assert (tmp_path / "offloaded").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("installed", [True, False])
def test_out_of_memory_is_one_sentence_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    spec = importlib.util.find_spec("json") if installed else None
    monkeypatch.setattr("fasa_sglang.calibration.model.find_spec", lambda name: spec)
    with pytest.raises(CalibrationError) as caught, memory_errors_explained("big"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmore")
    message = str(caught.value)
    assert "memory does not suffice to calibrate big" in message
    assert "--device cpu --out FILE" in message and "\n" not in message
    assert ("pip install accelerate" in message) == (not installed)


def test_load_model_passes_dtype_and_trust_on(tiny_path: Path) -> None:
    model, _ = load_model(str(tiny_path), "cpu", dtype="bfloat16", trust_remote_code=True)
    assert model.dtype == torch.bfloat16


def test_load_model_with_a_missing_revision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CalibrationError, match="cannot load the model no-user/no-model"):
        load_model("no-user/no-model", "cpu", revision="v2")


def test_killed_process_leaves_a_part_file_until_the_next_start(tmp_path: Path) -> None:
    """Parts of running processes and of other hosts stay."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    names = [f".c.fasa.part-{host}-{pid}" for pid in (ended.pid, os.getpid())]
    names.append(f".c.fasa.part-elsewhere-{ended.pid}")
    for name in names:
        (tmp_path / name).touch()
    remove_stale_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


def held_out(dominant: DominantFCs, num_fcs: int) -> float:
    figures = dominant.provenance["held_out"]
    return figures["agreement"][figures["num_fcs"].index(num_fcs)]


def test_calibrate_smollm2_quarter_of_the_chunks_agrees_with_top_k(
    smollm2_dominant: DominantFCs,
) -> None:
    assert held_out(smollm2_dominant, 8) >= 0.68


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch on one thread: beside another load, two would spin while they wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_calibrate_smollm2_by_agreement_prefers_the_true_pairs(smollm2_path: Path) -> None:
    """With the paper's ranker, RoPE's own pairs beat the adjacent dims of the paper's code."""
    model, tokenizer = load_model(str(smollm2_path), "cpu")
    figures = {}
    for interleaved in (False, True):
        start = time.process_time()
        dominant = calibrate(
            model,
            tokenizer,
            corpus.default_text(),
            corpus.held_out_text(),
            CalibrationSettings(ranker="agreement"),
            interleaved=interleaved,
        )
        assert time.process_time() - start < 180
        figures[interleaved] = held_out(dominant, 8)
    assert figures[False] >= 0.58
    assert figures[True] < figures[False] - 0.01
