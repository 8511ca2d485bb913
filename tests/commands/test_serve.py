"""``fasa serve``: it calibrates at the first start only, serves, and refuses before it works."""

from __future__ import annotations

import json
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
import torch

from fasa_sglang.calibration_cache import cached_calibration, model_fingerprint
from fasa_sglang.commands.calibration_origin import CalibrationOrigin, calibration_origin
from fasa_sglang.commands.server_flags import FIELDS, ServerFlags
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import CalibrationError, FasaError
from serving import free_port

FASA = shutil.which("fasa", path=Path(sys.executable).parent)
PLAIN = ("--sampling-backend", "pytorch", "--grammar-backend", "none")
SMALL = ("--max-total-tokens", "3000", "--mem-fraction-static", "0.3")
POOL = ("--max-total-tokens", "5000", "--mem-fraction-static", "0.3")


def start(cache: Path, *arguments: str, **environment: str) -> tuple[subprocess.Popen[Any], Path]:
    """Start ``fasa serve``; returns its process and its log file."""
    log = cache / "log"
    process = subprocess.Popen(
        [str(FASA), "serve", *arguments],
        cwd=cache,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return process, log


def stop(process: subprocess.Popen[Any]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


def announced(process: subprocess.Popen[Any], log: Path) -> dict[str, str]:
    """Wait for the five lines; returns them by their first word."""
    for _ in range(300):
        rows = dict(re.findall(r"^ *fasa (\w+) +(.*\S)", log.read_text(), re.MULTILINE))
        if len(rows) == 5:
            return rows
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def wait_for_text(process: subprocess.Popen[Any], log: Path, text: str) -> None:
    for _ in range(1200):
        if text in log.read_text():
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate of another host, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    paths = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=example.org", "-out", paths[0], "-keyout", paths[1]]
    subprocess.run(command, check=True, capture_output=True)
    return paths


@pytest.mark.slow
def test_serve_calibrates_at_the_first_start_only(
    tiny_path: Path, tmp_path: Path, certificate: tuple[str, str]
) -> None:
    """The second start is behind an API key and TLS, and its settings come from a file."""
    settings = {"min_seq_len": 16, "label_dtype": "bf16", "num_fcs": 8}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**settings, "recent": 9}))
    port = str(free_port())
    flags = [*PLAIN, *SMALL, "--port", port, "--budget=64", "--default", "auto"]
    secure = ["--api-key", "secret", "--ssl-certfile", certificate[0]]
    secure += ["--ssl-keyfile", certificate[1]]
    # SGLang spawns its processes here, as on a user's machine; see tests/forked_processes.
    environment = {"FASA_CONFIG": str(file), "PYTHONPATH": ""}
    for origin, extra in (("made now", []), ("kept from an earlier run", secure)):
        process, log = start(tmp_path, *flags, str(tiny_path), *extra, **environment)
        try:
            rows = announced(process, log)
            made = "calibration: ranking" in log.read_text()
            assert made == (origin == "made now")
            assert "LlamaForCausalLM, 2 of 2 layers rank tokens, 2 KV heads" in rows["model"]
            assert rows["calibration"].endswith(f"({origin})")
            assert rows["budget"].startswith("64 tokens, at most 4096; default auto, sparse from")
            # One selecting layer with 2 KV heads, 8 chunks of 2 dims, and 2 bytes per dim.
            assert rows["labels"] == "8 of 16 chunks in bf16, 64 bytes a token"
            scheme = "https" if extra else "http"
            url = f"{scheme}://127.0.0.1:{port}"
            assert rows["pool"] == f"3,000 tokens, serving at {url}"
            headers = {"Authorization": "Bearer secret"}
            body = {"text": "x = 1\n" * 20, "sampling_params": {"max_new_tokens": 4}}
            with httpx.Client(verify=False, headers=headers, timeout=60) as client:
                reply = client.post(f"{url}/generate", json=body).json()
                served = client.get(f"{url}/server_info").json()["json_model_override_args"]
            assert reply["meta_info"]["fasa"]["sparse_steps"] == 3
            # All settings travel in the flag, so that no process reads the file again.
            merged = json.loads(served)["fasa"]
            assert {"recent": 9, "budget": 64, **settings}.items() <= merged.items()
        finally:
            stop(process)
    [kept] = (tmp_path / "fasa-sglang" / "calibrations").iterdir()
    assert kept.suffix == ".fasa"


@pytest.fixture(scope="module")
def phi3_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phi-3 with a short context, an unscaled RoPE, and a sliding window that SGLang ignores."""
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    path = tmp_path_factory.mktemp("phi3")
    config = Phi3Config(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        original_max_position_embeddings=2048,
        sliding_window=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(path)
    return path


@pytest.mark.thorough
def test_serve_phi3_with_a_short_context_serves_sparse_requests(
    phi3_path: Path, tmp_path: Path
) -> None:
    port = str(free_port())
    settings = '{"min_seq_len": 16, "budget": 64}'
    flags = [*PLAIN, *SMALL, "--port", port, "--settings", settings]
    process, log = start(tmp_path, str(phi3_path), *flags)
    try:
        announced(process, log)
        body = {
            "text": "x = 1\n" * 20,
            "sampling_params": {"max_new_tokens": 4, "custom_params": {"fasa": True}},
        }
        reply = httpx.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=60).json()
    finally:
        stop(process)
    assert reply["meta_info"]["fasa"]["sparse_steps"] == 3
    assert "calibration: judging, layer 2 of 2" in log.read_text()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGINT, 128 + signal.SIGINT, marks=pytest.mark.thorough),
    ],
)
def test_serve_ended_during_calibration_ends_all_processes_and_leaves_no_files(
    tiny_path: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """SIGTERM goes to the command alone, and Ctrl-C to all processes of its terminal.

    The part file of a process that died earlier goes too. No sentence calls the end a failure.
    """
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    calibrations = tmp_path / "fasa-sglang" / "calibrations"
    calibrations.mkdir(parents=True)
    (calibrations / f".old.fasa.part-{os.uname().nodename}-{ended.pid}").touch()
    process, log = start(tmp_path, str(tiny_path), *PLAIN, *POOL)
    wait_for_text(process, log, "calibration: ranking, layer 1 of 2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    if number == signal.SIGTERM:
        os.kill(process.pid, number)
    else:
        os.killpg(process.pid, number)
    assert process.wait(30) == code
    wait_for_end_of_group(process.pid)
    assert not list(calibrations.iterdir())
    assert "fasa serve:" not in log.read_text()


def wait_for_end_of_group(group: int) -> None:
    """Wait until no process of a process group is left."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("processes are left")


def test_serve_of_what_cannot_be_served_is_refused_before_calibrating(tmp_path: Path) -> None:
    """The model does not exist, and no message mentions it."""
    cases = {
        ("--settings", '{"bugdet": 1}'): "unknown setting 'bugdet' in --settings",
        ("--max-total-tokenz", "3"): "unrecognized arguments: --max-total-tokenz",
    }
    runs = []
    for flags, message in cases.items():
        folder = tmp_path / flags[0]
        folder.mkdir()
        runs.append((message, *start(folder, "/no/such/model", *flags)))
    for message, process, log in runs:
        assert process.wait(180) == 1
        assert log.read_text().splitlines()[-1].startswith("fasa serve: ")
        assert message in log.read_text()
        assert "Traceback" not in log.read_text()


def find(model: str, calibration: str = "auto", load_format: str = "auto") -> CalibrationOrigin:
    """Where a server of a model would take its calibration from."""
    fields = dict.fromkeys(["argv", *FIELDS])
    flags = ServerFlags(**{**fields, "model_path": model, "load_format": load_format})
    return calibration_origin(flags, FasaConfig(calibration=calibration))


def test_calibration_origin_tells_first_starts_from_later_ones(
    tiny_path: Path, tiny_calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cached_calibration(str(tiny_path))
    assert find(str(tiny_path)) == CalibrationOrigin(path, "made now")
    assert not list(path.parent.iterdir())
    shutil.copy(tiny_calibration, path)
    assert find(str(tiny_path)) == CalibrationOrigin(path, "kept from an earlier run")
    given = find(str(tiny_path), tiny_calibration)
    assert given == CalibrationOrigin(Path(tiny_calibration), "given")


def test_calibration_origin_of_random_weights_is_no_file() -> None:
    origin = find("/no/such/model", load_format="dummy")
    assert origin == CalibrationOrigin(None, "of random weights, not kept")


@pytest.mark.parametrize("home", ["/proc/nope", "/dev/null"])
def test_calibration_origin_without_a_writable_cache_is_refused(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    message = rf"cannot create the cache folder {home}/fasa-sglang/calibrations .*XDG_CACHE_HOME"
    with pytest.raises(FasaError, match=message):
        find(str(tiny_path))


def test_calibration_origin_with_an_invalid_cached_file_names_the_way_out(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cached_calibration(str(tiny_path))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"broken")
    with pytest.raises(CalibrationError, match=f"or delete {path} and start again"):
        find(str(tiny_path))


def test_calibration_origin_with_a_missing_file_is_refused(tiny_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot read the calibration file /no/such/file"):
        find(str(tiny_path), "/no/such/file")


def test_calibration_origin_of_a_missing_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match="cannot load the model no-such-user/no-such-model"):
        find("no-such-user/no-such-model")


def test_fingerprint_of_a_fine_tune_differs_from_its_base(tmp_path: Path) -> None:
    """The shape and the file sizes are the same, the weights are not."""
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


def test_fingerprint_of_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"has no readable config\.json"):
        model_fingerprint(str(tmp_path))
