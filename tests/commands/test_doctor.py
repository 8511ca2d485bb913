"""``fasa doctor``: hooks that cannot be set, models, and calibrations that do not fit or exist."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from fasa_sglang.calibration_cache import cached_calibration
from fasa_sglang.cli import main
from fasa_sglang.commands.doctor import _configuration
from fasa_sglang.commands.model_facts import ModelFacts, model_facts
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import UnsupportedModelError
from fasa_sglang.names import PLATFORM_NAME
from fasa_sglang.own_command import own_command

# Python raises the same for this as for a package that is not installed.
WITHOUT_JSONSCHEMA = """
import sys
sys.modules["jsonschema"] = None
from fasa_sglang.commands.doctor import _hooks
_hooks()
"""


def test_hooks_that_cannot_be_set_name_the_missing_package(tmp_path: Path) -> None:
    """SGLang only reports that its module lacks the class, because it cannot import the module."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JSONSCHEMA],
        env={**os.environ, "SGLANG_PLATFORM": PLATFORM_NAME},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    [message] = [line for line in done.stderr.splitlines() if "errors.FasaError:" in line]
    assert "serving_chat.OpenAIServingChat._build_chat_response (import of jsonschema" in message
    assert "sglang.srt.managers" not in message, "only what is missing"


def doctor(
    tmp_path: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the command; returns the process and the table's rows by their first column."""
    process = subprocess.run(
        own_command("doctor", *arguments),
        env={
            **os.environ,
            "SGLANG_PLATFORM": PLATFORM_NAME,
            "XDG_CACHE_HOME": str(tmp_path),
            "COLUMNS": "400",
            **environment,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in process.stdout.splitlines() if "│" in line]
    return process, {line.split("│")[1].strip(): line for line in lines}


def test_doctor_with_a_calibration_of_another_model_refuses_it(
    smollm2_path: Path, tiny_calibration: str, tmp_path: Path
) -> None:
    arguments = ("--model", str(smollm2_path), "--calibration", tiny_calibration)
    process, rows = doctor(tmp_path, *arguments)
    assert process.returncode == 1
    assert "8 of 16 chunks by deviation" in rows["configuration"]
    assert "num_layers 2 but the model has 30" in rows["model"]
    assert "head_dim 32 but the model has 64" in rows["model"]
    assert process.stderr.endswith("a server would be refused because of: model\n")


def test_doctor_of_a_model_whose_window_sglang_ignores_says_so(tmp_path: Path) -> None:
    from transformers import Phi3Config

    config = Phi3Config(
        architectures=["Phi3ForCausalLM"],
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=256,
        pad_token_id=0,
    )
    config.save_pretrained(tmp_path / "phi3")
    process, rows = doctor(tmp_path, "--model", "phi3", FASA_CONFIG='{"num_dense_layers": 0}')
    assert process.returncode == 0, process.stdout
    assert "Phi3ForCausalLM: 2 of 2 layers select" in rows["model"]
    assert "SGLang ignores its sliding window of 256 tokens" in rows["model"]


def test_doctor_with_auto_looks_the_models_calibration_up(
    tiny_path: Path, tiny_calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first start there is none; a calibration need not say how it was made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ("--model", str(tiny_path), "--json", str(tmp_path / "report.json"))
    process, rows = doctor(tmp_path, *arguments, "--calibration", "auto")
    assert process.returncode == 0, process.stdout
    assert "none yet, the server makes it at its first start" in rows["configuration"]
    assert "1 of 2 layers select, 2 attend to all tokens" in rows["model"]
    assert "6 query and 2 KV heads of 32" in rows["model"]
    assert "RoPE is measured when the server starts" in rows["model"]
    assert "sliding window" not in rows["model"]
    assert '"what": "model"' in (tmp_path / "report.json").read_text()
    cached = cached_calibration(str(tiny_path))
    cached.parent.mkdir(parents=True)
    replace(DominantFCs.load(tiny_calibration), provenance={}).save(cached)
    process, rows = doctor(tmp_path, *arguments, FASA_CONFIG='{"calibration": "auto"}')
    assert process.returncode == 0, process.stdout
    assert f"{cached}: LlamaForCausalLM, 8 of 16 chunks (the file does" in rows["configuration"]


def test_doctor_with_an_unwritable_report_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "/nodir/x"]) == 1
    assert "there is no folder /nodir; create it first" in capsys.readouterr().err


def test_doctor_with_auto_and_no_model_says_what_is_missing() -> None:
    assert "auto; pass --model to look it up" in _configuration(None, "auto")


def facts_of(**fields: Any) -> ModelFacts:
    """Facts of a config of six layers; ``fields`` replaces others of its fields."""
    config = PretrainedConfig(
        architectures=["TestForCausalLM"],
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        **fields,
    )
    return model_facts(config)


def test_model_facts_count_the_layers_that_attend_to_all_tokens() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    facts = facts_of(layer_types=kinds, sliding_window=128, num_key_value_heads=2, head_dim=32)
    assert facts == ModelFacts("TestForCausalLM", 6, 1, 4, 2, 32, ignored_window=None)


def test_model_facts_of_a_plain_config_are_those_of_full_attention() -> None:
    assert facts_of() == ModelFacts("TestForCausalLM", 6, 6, 4, 4, 16, ignored_window=None)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": 256}, 256),
        ({"sliding_window": 256, "use_sliding_window": False}, None),
        ({"sliding_window": None}, None),
    ],
    ids=str,
)
def test_model_facts_name_a_window_that_sglang_ignores(
    fields: dict[str, Any], window: int | None
) -> None:
    """A config without ``layer_types`` is served with full attention in all layers."""
    assert facts_of(**fields).ignored_window == window


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_lora_rank": 8}, "TestForCausalLM uses multi-head latent attention"),
        (
            {"layer_types": ["linear_attention", "sliding_attention"] * 3},
            "no layer of TestForCausalLM attends to all tokens .its layers are of type "
            "linear_attention, sliding_attention",
        ),
    ],
    ids=["latent", "no full layer"],
)
def test_model_facts_of_a_model_that_cannot_be_served_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        facts_of(**fields)
