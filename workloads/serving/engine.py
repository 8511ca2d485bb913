"""Start SGLang in this process's children: on CUDA if there is one, else on the CPU platform."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.errors import FasaError
from fasa_sglang.names import PLATFORM_NAME

# Neither the torch backend nor a CPU can capture graphs.
EAGER = {"cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled"}
DENSE_BACKEND = {"cpu": "torch_native", "cuda": "flashinfer"}


def engine_arguments(
    model: str | Path, fasa: dict[str, Any] | None, **overrides: Any
) -> dict[str, Any]:
    """Keyword arguments for ``sglang.Engine``, and this process's environment set for it.

    Args:
        model: Hugging Face folder or hub name.
        fasa: The server's FASA settings; None runs SGLang's own backend, ``flashinfer`` on a GPU
            and ``torch_native`` on a CPU.
        overrides: Anything ``sglang.Engine`` takes; wins over ours.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments: dict[str, Any] = {
        "model_path": str(model),
        "attention_backend": DENSE_BACKEND[device] if fasa is None else "fasa",
        "log_level": "error",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "cuda_graph_backend_prefill": "disabled",
    }
    if device == "cpu" or (fasa or {}).get("selector", "fasa") != "fasa":
        arguments.update(EAGER)
    if fasa is not None:
        arguments["json_model_override_args"] = json.dumps({"fasa": fasa})
    if device == "cpu":
        os.environ["SGLANG_PLATFORM"] = PLATFORM_NAME
        # SGLang's scheduler and the model share the cores; more threads only fight.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        arguments.update(device="cpu", dtype="float32", mem_fraction_static=0.3)
    return {**arguments, **overrides}


@contextmanager
def running_engine(
    model: str | Path, fasa: dict[str, Any] | None, **overrides: Any
) -> Iterator[Any]:
    """An ``sglang.Engine`` for the time of a ``with`` block; arguments as ``engine_arguments``.

    SGLang spawns its processes, so the calling script needs ``if __name__ == "__main__"``.
    """
    arguments = engine_arguments(model, fasa, **overrides)
    import sglang

    engine = sglang.Engine(**arguments)
    try:
        yield engine
    finally:
        engine.shutdown()


def flush_cache(engine: Any, timeout_sec: float = 10.0) -> None:
    """Empty the prefix cache of an engine that has nothing to do.

    Under overlap scheduling a reply arrives one step before the scheduler is idle, and SGLang
    refuses to flush until then.

    Raises:
        FasaError: The engine did not become idle in time.
    """
    deadline = time.monotonic() + timeout_sec
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise FasaError(
                f"the engine was still busy after {timeout_sec} s, expected it idle; wait for all "
                "replies before flushing the prefix cache"
            )
        time.sleep(0.01)


def update_weights(engine: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace some weights of a running engine; names as in the model's checkpoint.

    Raises:
        FasaError: SGLang refuses them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sessions = hasattr(engine, "begin_weight_update")  # SGLang 0.5.20 and later
    if sessions:
        engine.begin_weight_update()
    done = engine.update_weights_from_tensor(
        [(name, weight.to(device)) for name, weight in weights.items()]
    )
    if sessions:
        engine.end_weight_update()
    success, why = done[:2]
    if not success:
        raise FasaError(f"SGLang did not take the weights {', '.join(weights)}: {why}")
