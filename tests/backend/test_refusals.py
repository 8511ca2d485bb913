"""What cannot work does not start: one sentence, and a non-zero exit code."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving import free_port, server_command, server_environment


@pytest.fixture(scope="module")
def paths(
    tiny_path: Path,
    tiny_calibration: str,
    smollm2_calibration: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("refusals")
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=49152)).save_pretrained(
        folder / "gpt2"
    )
    for file in tiny_path.glob("token*"):
        (folder / "gpt2" / file.name).write_bytes(file.read_bytes())
    truncated = folder / "truncated.safetensors"
    truncated.write_bytes(Path(tiny_calibration).read_bytes()[:500])
    return {
        "tiny": str(tiny_path),
        "gpt2": str(folder / "gpt2"),
        "own": tiny_calibration,
        "other": smollm2_calibration,
        "truncated": str(truncated),
    }


# Name: (model, settings, flags, environment, what the log must say). "{own}" and the like stand
# for the files above. The first ones are the small draw.
CASES: dict[str, tuple[str, dict[str, Any] | None, tuple[str, ...], dict[str, str], str]] = {
    "another-models-calibration": (
        "tiny",
        {"calibration": "{other}"},
        (),
        {},
        "was calibrated for num_layers 30 but the model has 2",
    ),
    "no-rope": ("gpt2", {"calibration": "{own}"}, (), {}, "no rotary position embedding"),
    "page-size": (
        "tiny",
        {"calibration": "{own}"},
        ("--page-size", "16"),
        {},
        "needs page_size 1, got 16",
    ),
    "unknown-selector": (
        "tiny",
        {"calibration": "{own}", "selector": "best"},
        (),
        {},
        "quest, paged, per_head, any, got 'best'",
    ),
    "no-calibration": ("tiny", None, (), {}, "FASA needs a calibration file; run: fasa calibrate"),
    "truncated-calibration": (
        "tiny",
        {"calibration": "{truncated}"},
        (),
        {},
        "truncated or not a safetensors file",
    ),
    "too-many-chunks": (
        "tiny",
        {"calibration": "{own}", "num_fcs": 17},
        (),
        {},
        "num_fcs must be from 1 to the model's 16 frequency chunks, got 17",
    ),
    "mixed-chunk": (
        "tiny",
        {"calibration": "{own}"},
        ("--enable-mixed-chunk",),
        {},
        "FASA does not work with enable_mixed_chunk=True",
    ),
    "unchecked-requests": (
        "tiny",
        {"calibration": "{own}"},
        ("--tokenizer-worker-num", "2"),
        {},
        "FASA does not work with tokenizer_worker_num=2",
    ),
    "another-prefill-backend": (
        "tiny",
        {"calibration": "{own}"},
        ("--prefill-attention-backend", "torch_native"),
        {},
        "prefill_attention_backend='torch_native' would fill keys that have no label",
    ),
    "unreadable-config": (
        "tiny",
        None,
        (),
        {"FASA_CONFIG": "/no/such/file.json"},
        "FASA_CONFIG must be a JSON object or the path of a readable JSON file",
    ),
}


@pytest.mark.slow
def test_server_refuses_to_start(
    paths: dict[str, str], tmp_path: Path, draw: Callable[[Any, Any], Any]
) -> None:
    def problem(name: str) -> str | None:
        model, settings, flags, environment, message = CASES[name]
        if settings is not None:
            settings = {**settings, "calibration": settings["calibration"].format(**paths)}
        done = subprocess.run(
            server_command(Path(paths[model]), settings, "--port", str(free_port()), *flags),
            env=server_environment(**environment),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode != 0 and message in done.stdout + done.stderr:
            return None
        return f"{name}: exit {done.returncode}, {done.stderr[-2000:]}"

    # Most of a start is imports, on one core.
    with ThreadPoolExecutor(max_workers=2) as pool:
        problems = list(filter(None, pool.map(problem, list(CASES)[: draw(4, len(CASES))])))
    assert not problems, "\n\n".join(problems)
