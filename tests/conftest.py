"""Fixtures shared by all tests: models, calibrations, a server, and the size of slow tests."""

from __future__ import annotations

import fcntl
import os
import runpy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang.cli import main
from fasa_sglang.names import PLATFORM_NAME
from serving import running_server, server_command

BuildOnce = Callable[[str, Callable[[Path], None]], Path]

# A shell lets its background jobs ignore Ctrl-C, and so would the servers that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Read when SGLang is imported, which forked processes do not do again.
    os.environ["SGLANG_PLATFORM"] = PLATFORM_NAME
    folder = str(Path(__file__).with_name("forked_processes"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    forked_processes = runpy.run_path(f"{folder}/sitecustomize.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run slow tests at their full count")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "thorough" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="runs with --all"))


@pytest.fixture(scope="session")
def draw(request: pytest.FixtureRequest) -> Callable[[Any, Any], Any]:
    """``draw(small, full)`` returns ``full`` with ``--all`` and ``small`` without."""
    return lambda small, full: full if request.config.getoption("--all") else small


@pytest.fixture(scope="session")
def build_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> BuildOnce:
    """``build_once(name, build)`` returns the path of something slow to make.

    ``build(path)`` writes a file or a folder. It runs once per test run: the workers of
    pytest-xdist share the result, and those that come second wait.
    """
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        # The workers' own folders lie in one that belongs to this run.
        folder = folder.parent

    def build_or_wait(name: str, build: Callable[[Path], None]) -> Path:
        path, partial = folder / name, folder / f"partial-{name}"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                build(partial)
                partial.rename(path)
        return path

    return build_or_wait


@pytest.fixture
def spawned_processes() -> Iterator[None]:
    """Let SGLang spawn its processes, so that they read the environment when they import it."""
    if torch.cuda.is_available():
        yield
        return
    set_start_method = forked_processes["set_start_method"]
    set_start_method("spawn", force=True)
    yield
    set_start_method("fork", force=True)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    from fasa_sglang.workloads.models.packaged import packaged_model

    return packaged_model("smollm2")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma-3-270M, for tests that are marked ``thorough``."""
    from fasa_sglang.workloads.models.packaged import packaged_model

    return packaged_model("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2_calibration(smollm2_path: Path, build_once: BuildOnce) -> str:
    """SmolLM2 calibrated as ``fasa calibrate`` does it by default."""
    return str(build_once("smollm2.fasa", lambda path: calibrate(smollm2_path, path)))


@pytest.fixture(scope="session")
def smollm2_dominant(smollm2_calibration: str) -> Any:
    """The contents of ``smollm2_calibration``."""
    from fasa_sglang.dominant_fcs import DominantFCs

    return DominantFCs.load(smollm2_calibration)


def calibrate(model: Path, out: Path, *flags: str) -> None:
    """Run ``fasa calibrate`` with a pool of the size that it needs."""
    command = ["calibrate", str(model), "--out", str(out), "--no-picture"]
    assert main([*command, "--max-total-tokens", "5000", *flags]) == 0


@pytest.fixture(scope="session")
def tiny_path(smollm2_path: Path, build_once: BuildOnce) -> Path:
    """Two random layers with SmolLM2's tokenizer: for bookkeeping, not for quality.

    Large weights make attention peaked, so that reading the wrong tokens changes the output.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )

    def build(path: Path) -> None:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
        AutoTokenizer.from_pretrained(smollm2_path).save_pretrained(path)

    return build_once("tiny", build)


@pytest.fixture(scope="session")
def tiny_calibration(tiny_path: Path, build_once: BuildOnce) -> str:
    flags = ("--num-fcs", "8", "--tokens", "512", "--top-k", "32", "--num-queries", "8")
    return str(build_once("tiny.fasa", lambda path: calibrate(tiny_path, path, *flags)))


@pytest.fixture(scope="session")
def random_model(build_once: BuildOnce) -> Path:
    """Four random layers without a tokenizer, in a size that FlashInfer has kernels for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
        initializer_range=0.1,
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32

    def build(path: Path) -> None:
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(dtype).save_pretrained(path)

    return build_once("random", build)


@pytest.fixture(scope="session")
def random_calibration(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration of ``random_model``: with random weights all chunks are equally good."""
    from fasa_sglang.workloads.models.pretrained import load_config
    from fasa_sglang.workloads.models.random_weights import any_chunks, config_shape

    shape = config_shape(load_config(str(random_model)))
    path = tmp_path_factory.mktemp("calibration") / "random.fasa"
    any_chunks(shape, 16).save(path)
    return str(path)


@pytest.fixture(scope="module")
def server(
    tiny_path: Path, tiny_calibration: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A real server over HTTP, one for every file that uses it.

    It cannot be shared by all files: shutting an engine down kills all children of the process.
    """
    settings = {
        "calibration": tiny_calibration,
        "min_seq_len": 0,
        "max_budget": 1024,
        "budget": 128,
    }
    flags = ("--served-model-name", "tiny", "--enable-metrics")
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(server_command(tiny_path, settings, *flags), log) as url:
        yield url
