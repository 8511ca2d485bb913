"""Engines for the tests, and what it means that two runs gave the same tokens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from fasa_sglang.names import PLATFORM_NAME

# Sums depend on the batch's shape. Where the two best tokens are this close, either may win
# without a fault; such a divergence is listed and counts as equal. A CPU serves float32, a GPU
# bfloat16: the random models' logits then come in steps of 1/32, and of 216 replies that parted
# from SGLang's own backend 77 did at a tie, 107 at one step, 28 at two, 3 at three and 1 above.
MARGIN = 0.25 if torch.cuda.is_available() else 1e-4


def generate(
    engine: Any,
    prompts: Sequence[list[int]],
    fasa: Sequence[Any],
    max_new_tokens: int,
    return_logprob: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """Send a batch of token-id prompts, each with its own ``fasa`` parameter, greedily.

    ``more`` goes into the sampling parameters.
    """
    sampling_params = []
    for asked in fasa:
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens, **more}
        if asked is not None:
            params["custom_params"] = {"fasa": asked}
        sampling_params.append(params)
    return engine.generate(
        input_ids=list(prompts),
        sampling_params=sampling_params,
        return_logprob=return_logprob,
        top_logprobs_num=2 if return_logprob else 0,
    )


def margins(reply: dict[str, Any]) -> list[float]:
    """Lead of the chosen token over the next best, per output token, in nats."""
    return [top[0][0] - top[1][0] for top in reply["meta_info"]["output_top_logprobs"]]


def divergence(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    """What differs between two greedy replies; None if nothing does that counts.

    ``expected`` carries log-probabilities. A difference at a near tie is printed.
    """
    wanted, came = expected["output_ids"], got["output_ids"]
    if wanted == came:
        return None
    step = agreeing_steps(wanted, came)
    margin = margins(expected)[step] if step < len(wanted) else float("inf")
    if margin < MARGIN:
        print(f"near tie at step {step}, margin {margin:.1e}: counts as equal")
        return None
    return (
        f"prompt of {expected['meta_info']['prompt_tokens']} tokens differs at step {step}, "
        f"margin {margin:.1e}: {wanted} against {came}"
    )


def agreeing_steps(wanted: list[int], came: list[int]) -> int:
    """Tokens before the first difference."""
    return next(
        (i for i, pair in enumerate(zip(wanted, came, strict=False)) if pair[0] != pair[1]),
        min(len(wanted), len(came)),
    )


def server_command(model: Path, settings: dict[str, Any] | None, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--attention-backend", "fasa", "--dtype", "float32", "--device", "cpu"]
    command += ["--cuda-graph-backend-decode", "disabled"]
    command += ["--cuda-graph-backend-prefill", "disabled", "--sampling-backend", "pytorch"]
    command += ["--grammar-backend", "none", "--max-total-tokens", "6000"]
    command += ["--mem-fraction-static", "0.3"]
    if settings is not None:
        command += ["--json-model-override-args", json.dumps({"fasa": settings})]
    return [*command, *flags]


@contextmanager
def running_server(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """The URL of a server that answers; ``command`` lacks its port."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=server_environment(**environment),
            # Not the checkout, whose folders would hide the installed package.
            cwd=log.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(1)
            else:
                raise AssertionError(f"the server did not come up: {log.read_text()[-3000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(60)


def server_environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "SGLANG_PLATFORM": PLATFORM_NAME, "OMP_NUM_THREADS": "1", **changes}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
