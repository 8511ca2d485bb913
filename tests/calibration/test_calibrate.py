"""``fasa calibrate``: what it finds on a real model, and what it refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fasa_sglang.calibration import corpus
from fasa_sglang.calibration.calibrate import CalibrationSettings, calibrate, load_model
from fasa_sglang.calibration.capture import capture_qk
from fasa_sglang.cli import main
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError

SMALL = CalibrationSettings(tokens=256, top_k=16, num_queries=4)


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Any:
    return load_model(str(tiny_path), "cpu")


def calibrate_tiny(tiny: Any, settings: CalibrationSettings = SMALL) -> DominantFCs:
    model, tokenizer = tiny
    return calibrate(model, tokenizer, corpus.default_text(), corpus.held_out_text(), settings)


def test_capture_sees_every_layer_and_leaves_no_trace(tiny: Any) -> None:
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


def test_capture_is_undone_after_an_error(tiny: Any) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError, match="stop"), capture_qk(lambda *call: None):
        raise RuntimeError("stop")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_calibrating_twice_gives_identical_bytes(tiny: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        calibrate_tiny(tiny).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    calibrate_tiny(tiny, replace(SMALL, seed=1)).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_k_statistics_describe_the_keys(tiny: Any) -> None:
    model, tokenizer = tiny
    made = calibrate_tiny(tiny)
    ids = tokenizer(corpus.default_text().content[:9999], return_tensors="pt").input_ids[:, :256]
    keys = []
    with torch.inference_mode(), capture_qk(lambda layer, q, k, scale: keys.append(k)):
        model(input_ids=ids)
    torch.testing.assert_close(made.k_mean[1], keys[1].mean(dim=1))
    spread = (keys[1] - keys[1].mean(dim=1, keepdim=True)).abs().amax(dim=1)
    torch.testing.assert_close(made.k_scale[1], spread)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranker": "magic"}, "ranker must be one of deviation, separation"),
        ({"tokens": 100}, r"at least 4 \* top_k tokens, got .* tokens 100"),
        ({"num_queries": 0}, "num_queries 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSettings(**{**{"tokens": 1024}, **change})


@pytest.mark.parametrize("num_fcs", [-1, 0, 17, 100])
def test_chunks_that_are_not_there_are_refused(tiny: Any, num_fcs: int) -> None:
    """Zero was once taken for "not given" and became the default without a word."""
    with pytest.raises(CalibrationError, match=f"16 frequency chunks, got {num_fcs}"):
        calibrate_tiny(tiny, replace(SMALL, num_fcs=num_fcs))


def test_text_longer_than_the_context_is_refused(tiny: Any) -> None:
    with pytest.raises(CalibrationError, match="needs a context of as many, the model has 4096"):
        calibrate_tiny(tiny, replace(SMALL, tokens=5000))


def test_command_refuses_a_short_text(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    assert main(["calibrate", "--model", str(tiny_path), "--text", str(short)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "needs 4096 tokens of text, short.txt has" in message
    assert "longer --text or a smaller --tokens" in message


def test_command_refuses_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--model", "/no/such/model"]) == 1
    assert "cannot load the model /no/such/model" in capsys.readouterr().err


def test_command_writes_file_picture_and_report(tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    arguments = ["calibrate", "--model", str(tiny_path), "--out", str(out), "--num-fcs", "3"]
    arguments += ["--tokens", "256", "--top-k", "16", "--json", str(tmp_path / "report.json")]
    assert main(arguments) == 0
    made = DominantFCs.load(out)
    assert made.num_fcs == 3
    assert made.provenance["held_out"]["num_fcs"] == [2, 3, 4, 8]
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "text_sha256" in (tmp_path / "report.json").read_text()


def held_out(dominant: DominantFCs, num_fcs: int) -> float:
    figures = dominant.provenance["held_out"]
    return figures["agreement"][figures["num_fcs"].index(num_fcs)]


def test_quarter_of_the_chunks_finds_the_top_tokens(
    smollm2_dominant: DominantFCs,
) -> None:
    assert held_out(smollm2_dominant, 8) >= 0.68


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two beside another load spin until the other comes, which is CPU time as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_rankers_and_layouts_on_smollm2(smollm2_path: Path) -> None:
    """By agreement, the paper's ranker; with true pairs and with its code's adjacent dims."""
    model, tokenizer = load_model(str(smollm2_path), "cpu")
    figures = {}
    for interleaved in (False, True):
        start = time.process_time()
        made = calibrate(
            model,
            tokenizer,
            corpus.default_text(),
            corpus.held_out_text(),
            CalibrationSettings(ranker="agreement"),
            interleaved=interleaved,
        )
        assert time.process_time() - start < 180
        figures[interleaved] = held_out(made, 8)
    assert figures[False] >= 0.58
    assert figures[True] < figures[False] - 0.01
