"""Every way to start a server: FASA serves, or the server ends with one sentence.

The start-ups run in one process (see ``forked_servers.py``); a case per flag is derived from the
tables of refusals, so a new row is covered as soon as it is written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.backend.refusals import ENVIRONMENT, FLAGS
from fasa_sglang.dominant_fcs import DominantFCs
from forked_servers import Outcome, known
from serving import server_command, server_environment

SERVES = "a request with fasa is decoded sparsely"
IS_DENSE = "the server runs another backend and answers a request with fasa with HTTP 400"
ENDS = "the server ends, here before it builds the attention backend"

# Command-line value of every flag in the table of refusals that is not a switch.
FLAG_VALUES = {
    "speculative_algorithm": "NGRAM",
    "dllm_algorithm": "LowConfidence",
    "hicache_storage_backend": "file",
    "radix_cache_backend": "custom",
    "disaggregation_mode": "prefill",
    "dcp_size": "2",
    "attn_cp_size": "2",
    "tokenizer_worker_num": "2",
}
# With these flags SGLang itself refuses this model or a CPU, or lacks a package, before it builds
# the attention backend. test_refusals.py checks what FASA says about them.
ENDED_BY_SGLANG = frozenset(
    {
        "speculative_algorithm",
        "dllm_algorithm",
        "disaggregation_mode",
        "disaggregation_decode_enable_offload_kvcache",
        "enable_two_batch_overlap",
        "enable_pdmux",
        "dcp_size",
        "attn_cp_size",
        "enable_nvidia_megakernel",
        "enable_amd_monokernel",
        "enable_deterministic_inference",
        "enable_memory_saver",
    }
)
if find_spec("sglang.srt.arg_groups.model_override_base") is None:
    # The package that serves gRPC needs a later release.
    ENDED_BY_SGLANG |= {"smg_grpc_mode"}


@dataclass(frozen=True)
class Startup:
    """One way to start a server.

    Args:
        expected: ``SERVES``, ``IS_DENSE``, ``ENDS``, or what the server says before it ends.
        flags: Command-line flags beside the common ones.
        settings: The ``fasa`` settings beside the calibration.
        model: Name of a model of the ``paths`` fixture.
        calibration: Name of a calibration of the ``paths`` fixture; None sets none.
        environment: Environment variables.
    """

    expected: str
    flags: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "tiny"
    calibration: str | None = "own"
    environment: dict[str, str] = field(default_factory=dict)


def flag_startup(name: str) -> Startup:
    """A start-up with an unsupported value of a flag of the table."""
    supported, _ = FLAGS[name]
    option = f"--{name.replace('_', '-')}"
    flags = (option,) if supported is False else (option, FLAG_VALUES[name])
    if name in ENDED_BY_SGLANG:
        return Startup(ENDS, flags)
    return Startup(f"FASA does not work with {name}=", flags)


def backend_startup(base: str | None, prefill: str | None, decode: str | None) -> Startup:
    """A start-up with a combination of the three flags that choose attention backends."""
    options = ("--attention-backend", "--prefill-attention-backend", "--decode-attention-backend")
    chosen = [(o, name) for o, name in zip(options, (base, prefill, decode), strict=True) if name]
    expected = "FASA selects tokens in decode steps, which 'torch_native' would run"
    if (decode or base) == "fasa":
        expected = SERVES
    elif (prefill or base) != "fasa":
        expected = IS_DENSE
    return Startup(expected, tuple(text for option in chosen for text in option))


STARTUPS: dict[str, Startup] = {
    "defaults": Startup(SERVES),
    **{f"flag {name}": flag_startup(name) for name in FLAGS if known(name)},
    **{
        f"environment {name}": Startup(
            f"FASA does not work with {name}=True in the environment", environment={name: "1"}
        )
        for name in ENVIRONMENT
        if known(name)
    },
    **{
        f"backends {base} {prefill} {decode}": backend_startup(base, prefill, decode)
        for base, prefill, decode in product(
            ("fasa", "torch_native"), (None, "fasa", "torch_native"), (None, "fasa", "torch_native")
        )
    },
    "backends auto fasa fasa": backend_startup(None, "fasa", "fasa"),
    "backends auto fasa auto": backend_startup(None, "fasa", None),
    "backends auto auto fasa": backend_startup(None, None, "fasa"),
    "prefill by an untried backend": Startup(
        "FASA works with prefill by fasa, fa3, flashinfer, triton, torch_native, got 'intel_amx'",
        ("--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "fasa"),
    ),
    "page size 1": Startup(SERVES, ("--page-size", "1")),
    "page size 16": Startup("needs page_size 1, got 16", ("--page-size", "16")),
    "page size 64": Startup("needs page_size 1, got 64", ("--page-size", "64")),
    "keys auto": Startup(SERVES, ("--kv-cache-dtype", "auto")),
    "keys bf16": Startup("got torch.bfloat16", ("--kv-cache-dtype", "bf16")),
    "keys fp8_e4m3": Startup("needs keys in the model's dtype", ("--kv-cache-dtype", "fp8_e4m3")),
    "keys fp8_e5m2": Startup("needs keys in the model's dtype", ("--kv-cache-dtype", "fp8_e5m2")),
    "model bfloat16": Startup(SERVES, ("--dtype", "bfloat16")),
    "model bfloat16, keys bf16": Startup(
        SERVES, ("--dtype", "bfloat16", "--kv-cache-dtype", "bf16")
    ),
    "model float16": Startup(SERVES, ("--dtype", "float16")),
    "labels bf16": Startup(SERVES, settings={"label_dtype": "bf16"}),
    "combine mean": Startup(SERVES, settings={"combine": "mean"}),
    "no selecting layer": Startup(SERVES, settings={"num_dense_layers": 2}),
    "no radix cache": Startup(SERVES, ("--disable-radix-cache",)),
    "no overlap": Startup(SERVES, ("--disable-overlap-schedule",)),
    "session radix cache": Startup(
        SERVES,
        ("--enable-session-radix-cache",),
        # SGLang 0.5.17 has the cache that this needs, but another one by default.
        environment={"SGLANG_ENABLE_UNIFIED_RADIX_TREE": "1"},
    ),
    "calibration of another model": Startup(
        "was calibrated for num_layers 30 but the model has 2", calibration="other"
    ),
    "calibration truncated": Startup(
        "truncated or not a safetensors file", calibration="truncated"
    ),
    "calibration missing": Startup("cannot read the calibration file", calibration="missing"),
    "calibration of other weights": Startup("was calibrated for weights", calibration="tuned"),
    "calibration made at start": Startup(SERVES, calibration=None),
    "model without RoPE": Startup(
        "none of the 2 such layers of GPT2LMHeadModel has a rotary embedding", model="gpt2"
    ),
    "selector unknown": Startup("any, got 'best'", settings={"selector": "best"}),
    "setting unknown": Startup("unknown setting 'bugdet'", settings={"bugdet": 1}),
    "budget too small": Startup("budget must be from", settings={"budget": 8}),
    "too many chunks": Startup(
        "num_fcs must be from 1 to the model's 16 frequency chunks, got 17",
        settings={"num_fcs": 17},
    ),
    "FASA_CONFIG unreadable": Startup(
        "FASA_CONFIG must be a JSON object or the path of a readable JSON file",
        environment={"FASA_CONFIG": "/no/such/file.json"},
    ),
    "FASA_CONFIG not JSON": Startup(
        "FASA_CONFIG does not hold valid JSON", environment={"FASA_CONFIG": "{budget: 3}"}
    ),
}


def test_startups_cover_at_least_sixty_ways() -> None:
    assert len(STARTUPS) >= 60


@pytest.fixture(scope="module")
def paths(
    tiny_path: Path,
    tiny_calibration: str,
    smollm2_shape_calibration: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Models and calibrations by the names that ``Startup`` uses."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("startups")
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=49152)).save_pretrained(
        folder / "gpt2"
    )
    for file in tiny_path.glob("token*"):
        (folder / "gpt2" / file.name).write_bytes(file.read_bytes())
    truncated = folder / "truncated.fasa"
    truncated.write_bytes(Path(tiny_calibration).read_bytes()[:500])
    own = DominantFCs.load(tiny_calibration)
    replace(own, fingerprint="0123456789abcdef").save(folder / "tuned.fasa")
    return {
        "tiny": str(tiny_path),
        "gpt2": str(folder / "gpt2"),
        "own": tiny_calibration,
        "other": smollm2_shape_calibration,
        "truncated": str(truncated),
        "missing": str(folder / "missing.fasa"),
        "tuned": str(folder / "tuned.fasa"),
    }


@pytest.fixture(scope="module")
def smollm2_shape_calibration(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration that fits SmolLM2, with arbitrary chunks."""
    from fasa_sglang.workloads.models.pretrained import load_config
    from fasa_sglang.workloads.models.random_weights import any_chunks, config_shape

    path = tmp_path_factory.mktemp("calibration") / "smollm2.safetensors"
    any_chunks(config_shape(load_config(str(smollm2_path))), 16).save(path)
    return str(path)


@pytest.fixture(scope="module")
def outcomes(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What happened at every start-up."""
    folder = tmp_path_factory.mktemp("outcomes")
    startups = [
        {
            "name": name,
            "arguments": arguments(startup, paths),
            "environment": startup.environment,
        }
        for name, startup in STARTUPS.items()
    ]
    (folder / "startups.json").write_text(json.dumps(startups))
    script = Path(__file__).parents[1] / "forked_servers.py"
    command = [sys.executable, str(script), "startups.json", "outcomes.json"]
    subprocess.run(command, cwd=folder, env=server_environment(), check=True, timeout=1700)
    read = json.loads((folder / "outcomes.json").read_text())
    return {name: Outcome(**outcome) for name, outcome in read.items()}


def arguments(startup: Startup, paths: dict[str, str]) -> list[str]:
    """Arguments of ``sglang.launch_server``."""
    settings = {"min_seq_len": 0, **startup.settings}
    if startup.calibration is not None:
        settings["calibration"] = paths[startup.calibration]
    arguments = server_command(Path(paths[startup.model]), settings)[3:]
    if any("attention-backend" in flag for flag in startup.flags):
        position = arguments.index("--attention-backend")
        del arguments[position : position + 2]
    return [*arguments, *startup.flags]


@pytest.mark.parametrize("name", STARTUPS)
def test_startup_serves_or_ends_with_one_sentence(name: str, outcomes: dict[str, Outcome]) -> None:
    expected, outcome = STARTUPS[name].expected, outcomes[name]
    if expected not in (SERVES, IS_DENSE):
        assert outcome.plain is None, f"it serves: {outcome.sparse}"
        assert outcome.exit_code not in (None, 0), outcome.log[-3000:]
        assert expected == ENDS or expected in outcome.log, outcome.log[-3000:]
        return
    assert outcome.plain is not None, outcome.log[-3000:]
    status, reply = outcome.plain
    assert status == 200, outcome.log[-3000:]
    assert outcome.sparse is not None
    if expected == IS_DENSE:
        assert "fasa" not in reply["meta_info"]
        status, message = outcome.sparse
        assert status == 400
        assert "this server does not run FASA" in message
        return
    assert reply["meta_info"]["fasa"]["sparse_steps"] == 0
    status, reply = outcome.sparse
    assert status == 200, outcome.log[-3000:]
    assert reply["meta_info"]["fasa"]["sparse_steps"] > 0
