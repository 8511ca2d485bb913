"""Fixtures shared by all tests: models, a calibration, and how much of a slow test to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serving import running_server, server_command


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run slow tests at their full count")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def draw(request: pytest.FixtureRequest) -> Callable[[Any, Any], Any]:
    """``draw(small, full)``: how much of a slow test to run."""
    return lambda small, full: full if request.config.getoption("--all") else small


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    from fasa_sglang.workloads.models.packaged import packaged_model

    return packaged_model("smollm2")


@pytest.fixture(scope="session")
def smollm2_dominant(smollm2_path: Path) -> Any:
    """SmolLM2 calibrated as ``fasa calibrate`` does it by default."""
    from fasa_sglang.calibration import corpus
    from fasa_sglang.calibration.calibrate import calibrate
    from fasa_sglang.calibration.model import load_model
    from fasa_sglang.calibration.settings import CalibrationSettings

    model, tokenizer = load_model(str(smollm2_path), "cpu")
    return calibrate(
        model, tokenizer, corpus.default_text(), corpus.held_out_text(), CalibrationSettings()
    )


@pytest.fixture(scope="session")
def smollm2_calibration(smollm2_dominant: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("calibration") / "smollm2.safetensors"
    smollm2_dominant.save(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers with SmolLM2's tokenizer: for bookkeeping, not for quality.

    Large weights make attention peaked, so that reading the wrong tokens changes the output.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
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
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(smollm2_path).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random layers without a tokenizer, in a size that FlashInfer has kernels for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("random")
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
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def random_calibration(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    from fasa_sglang.dominant_fcs import ModelShape
    from fasa_sglang.workloads.models.shapes import any_chunks, load_config

    shape = ModelShape.from_config(load_config(str(random_model)))
    path = tmp_path_factory.mktemp("calibration") / "random.safetensors"
    any_chunks(shape, 16).save(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_calibration(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    from fasa_sglang.calibration import corpus
    from fasa_sglang.calibration.calibrate import calibrate
    from fasa_sglang.calibration.model import load_model
    from fasa_sglang.calibration.settings import CalibrationSettings

    model, tokenizer = load_model(str(tiny_path), "cpu")
    settings = CalibrationSettings(num_fcs=8, tokens=512, top_k=32, num_queries=8)
    dominant = calibrate(model, tokenizer, corpus.default_text(), corpus.held_out_text(), settings)
    path = tmp_path_factory.mktemp("calibration") / "tiny.safetensors"
    dominant.save(path)
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
