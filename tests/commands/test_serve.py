"""``fasa serve``: the first start calibrates, the second does not, and both serve."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fasa_sglang.calibration_cache import cached_calibration, model_fingerprint
from fasa_sglang.errors import CalibrationError
from serving import free_port

FASA = shutil.which("fasa", path=Path(sys.executable).parent)


def start(model: Path, cache: Path, port: int, *flags: str) -> tuple[subprocess.Popen[Any], Path]:
    log = cache / f"log-{port}"
    command = [FASA, "serve", str(model), "--port", str(port), "--max-total-tokens", "3000"]
    command += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
    command += ["--mem-fraction-static", "0.3"]
    process = subprocess.Popen(
        [*command, *flags],
        cwd=cache,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return process, log


def wait_for_lines(process: subprocess.Popen[Any], log: Path) -> dict[str, str]:
    """The five lines, by their first word."""
    for _ in range(240):
        found = dict(re.findall(r"^ *fasa (\w+) +(.*\S)", log.read_text(), re.MULTILINE))
        if len(found) == 5:
            return found
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.slow
def test_first_start_calibrates_and_the_second_does_not(tiny_path: Path, tmp_path: Path) -> None:
    """Of a layout that is said to be another one, which the server has to be told as well."""
    settings = (
        '{"min_seq_len": 16, "label_dtype": "bf16", "num_fcs": 8, "rope_layout": "interleaved"}'
    )
    flags = ("--default", "auto", "--settings", settings)
    for time_of_start, origin in enumerate(("made now", "kept from an earlier run")):
        port = free_port()
        process, log = start(tiny_path, tmp_path, port, "--budget", "64", *flags)
        try:
            lines = wait_for_lines(process, log)
            assert ("calibrating" in log.read_text()) == (time_of_start == 0)
            assert "LlamaForCausalLM, 2 layers, 2 KV heads" in lines["model"]
            assert lines["calibration"].endswith(f"({origin})")
            assert lines["budget"].startswith("64 tokens, at most 4096; default auto, sparse from")
            # Two layers of two KV heads, 8 of 16 chunks of two dims, two bytes each.
            assert lines["labels"] == "8 of 16 chunks in bf16, 128 bytes a token"
            assert lines["pool"].startswith("3,000 tokens")
            body = {"text": "x = 1\n" * 20, "sampling_params": {"max_new_tokens": 4}}
            reply = httpx.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=60)
            assert reply.json()["meta_info"]["fasa"]["sparse_steps"] == 3
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    assert len(list((tmp_path / "fasa-sglang" / "calibrations").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "0"], "budget must be an integer of at least 1, got 0"),
        (["--settings", "[1]"], "--settings must be a JSON object"),
        (["--json-model-override-args", "{"], "--json-model-override-args does not hold valid"),
        (["--attention-backend", "triton"], "fasa serve sets --attention-backend itself"),
        (["--calibration", "/no/such/file"], "cannot read the calibration file /no/such/file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_served_is_refused_before_sglang_starts(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    """No model is looked at, and none is there."""
    command = [FASA, "serve", "/no/such/model", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [FASA, "serve", "no-such-user/no-such-model"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert "cannot load the model no-such-user/no-such-model" in done.stderr


def test_fingerprint_tells_a_fine_tune_from_its_base(tmp_path: Path) -> None:
    """Same shape, same file sizes, other weights."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(200_000))
    base = model_fingerprint(str(tmp_path))
    assert model_fingerprint(str(tmp_path)) == base
    weights.write_bytes(bytes(199_999) + b"\x01")
    assert model_fingerprint(str(tmp_path)) != base
    weights.write_bytes(bytes(200_000))
    (tmp_path / "notes.txt").write_text("not part of the model")
    assert model_fingerprint(str(tmp_path)) == base
    assert base in cached_calibration(str(tmp_path)).name


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no readable config"):
        model_fingerprint(str(tmp_path))
