"""Start SGLang as child processes of this one: on CUDA if available, else on the CPU platform."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.errors import FasaError
from fasa_sglang.names import BACKEND_NAME, PLATFORM_NAME

# Neither the torch backend nor a CPU can capture graphs.
EAGER = {"cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled"}
# Lets SGLang choose its attention backend.
AUTO = "auto"
# The SGLang backends whose dense steps FASA runs, so that replies can be compared token by token.
# On a GPU this is not SGLang's default, so benchmarks do not use it.
COMPARABLE_BACKEND = {"cpu": "torch_native", "cuda": "flashinfer"}


def engine_arguments(
    model: str | Path,
    fasa: dict[str, Any] | None,
    *,
    baseline: str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Keyword arguments for ``sglang.Engine``; also prepares this process's environment.

    Args:
        model: Hugging Face folder or hub name.
        fasa: The server's FASA settings; None runs SGLang without FASA.
        baseline: Attention backend if ``fasa`` is None, ``auto`` for SGLang's own choice. Default:
            ``COMPARABLE_BACKEND`` of the device.
        overrides: Further arguments of ``sglang.Engine``; they win over ours.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments: dict[str, Any] = {
        "model_path": str(model),
        "log_level": "error",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "cuda_graph_backend_prefill": "disabled",
    }
    if fasa is not None:
        arguments["attention_backend"] = BACKEND_NAME
        arguments["json_model_override_args"] = json.dumps({"fasa": fasa})
    elif baseline != AUTO:
        arguments["attention_backend"] = baseline or COMPARABLE_BACKEND[device]
    if (fasa or {}).get("selector", "fasa") != "fasa":
        arguments.update(EAGER)
    return {**arguments, **device_arguments(), **overrides}


def device_arguments() -> dict[str, Any]:
    """Arguments that SGLang needs on a CPU; empty on CUDA. Selects the CPU platform if needed."""
    if torch.cuda.is_available():
        return {}
    os.environ["SGLANG_PLATFORM"] = PLATFORM_NAME
    # SGLang's scheduler and the model share the cores; more threads would compete for them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return {**EAGER, "device": "cpu", "dtype": "float32", "mem_fraction_static": 0.3}


def import_sglang() -> None:
    """Import what SGLang's processes need, so that a fork of this process has it at once."""
    device_arguments()  # the platform, which SGLang reads when it is imported
    for module in ("entrypoints.engine", "managers.detokenizer_manager", "models.registry"):
        import_module(f"sglang.srt.{module}")
    import_module("sglang.srt.plugins").load_plugins()


@contextmanager
def running_engine(
    model: str | Path,
    fasa: dict[str, Any] | None,
    *,
    baseline: str | None = None,
    **overrides: Any,
) -> Iterator[Any]:
    """Run an ``sglang.Engine`` for the duration of a ``with`` block; see ``engine_arguments``.

    SGLang spawns its processes, so the calling script needs ``if __name__ == "__main__"``.
    """
    arguments = engine_arguments(model, fasa, baseline=baseline, **overrides)
    import sglang

    engine = sglang.Engine(**arguments)
    try:
        yield engine
    finally:
        engine.shutdown()


def flush_cache(engine: Any, timeout_sec: float = 10.0) -> None:
    """Empty the prefix cache of an idle engine.

    Under overlap scheduling a reply arrives one step before the scheduler is idle, and SGLang
    refuses to flush until then.

    Raises:
        FasaError: The engine did not become idle in time.
    """
    deadline = time.monotonic() + timeout_sec
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise FasaError(
                f"the engine was still busy after {timeout_sec} s, expected it to be idle; wait "
                "for all replies before flushing the prefix cache"
            )
        time.sleep(0.01)


def update_weights(engine: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace weights of a running engine.

    Args:
        engine: The engine.
        weights: Tensors by their names in the model's checkpoint.

    Raises:
        FasaError: SGLang rejects them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sessions = hasattr(engine, "begin_weight_update")  # SGLang 0.5.20 and later
    if sessions:
        engine.begin_weight_update()
    success, reason = engine.update_weights_from_tensor(
        [(name, weight.to(device)) for name, weight in weights.items()]
    )[:2]
    if sessions:
        engine.end_weight_update()
    if not success:
        raise FasaError(f"SGLang rejected the weights {', '.join(weights)}: {reason}")
