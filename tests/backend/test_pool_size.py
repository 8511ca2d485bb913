"""The label cache's bytes are taken into account where SGLang sizes its KV pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasa_sglang.workloads.engine import running_engine

# What one token of the tiny model costs, two layers and two KV heads: K and V of 32 float32 each,
# and a label of 4 chunks, two bf16 each.
KV_BYTES, LABEL_BYTES = 2 * 2 * 2 * 32 * 4, 2 * 2 * 8 * 2


def pool_tokens(model: Path, settings: dict[str, Any] | None) -> int:
    with running_engine(model, settings, mem_fraction_static=0.1) as engine:
        return int(engine.get_server_info()["max_total_num_tokens"])


def test_pool_leaves_room_for_the_labels(tiny_path: Path, tiny_calibration: str) -> None:
    plain = pool_tokens(tiny_path, None)
    with_labels = pool_tokens(tiny_path, {"calibration": tiny_calibration})
    expected = KV_BYTES / (KV_BYTES + LABEL_BYTES)
    # Free memory is not quite the same at the two starts.
    assert abs(with_labels / plain - expected) < 0.02
