"""The SGLang backends that benchmarks compare FASA with."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fasa_sglang.names import BACKEND_NAME
from fasa_sglang.workloads.serving.engine import AUTO
from fasa_sglang.workloads.serving.server_info import attention_backend


def add_baseline_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--baseline``."""
    parser.add_argument(
        "--baseline",
        type=parse_baselines,
        default=[AUTO],
        metavar="NAME,...",
        help="attention backends to compare with; auto is the one that SGLang chooses by itself",
    )


def parse_baselines(text: str) -> list[str]:
    """The argparse type of ``--baseline``: names without duplicates, in order."""
    names = [name.strip() for name in text.split(",")]
    if "" in names or BACKEND_NAME in names:
        raise argparse.ArgumentTypeError(
            f"expected SGLang's attention backends or {AUTO}, such as {AUTO},flashinfer; got "
            f"{text!r}"
        )
    return list(dict.fromkeys(names))


def baseline_label(name: str, info: Mapping[str, Any]) -> str:
    """How tables and plots call a baseline; ``auto`` is named after the resolved backend.

    Args:
        name: The name given to ``--baseline``.
        info: What the server or engine reports about itself.
    """
    backend = attention_backend(info)
    return f"{backend} (SGLang's default)" if name == AUTO else backend
