"""Models that the server benchmarks run: real ones, or shapes with dummy weights."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.workloads.models.packaged import packaged_model
from fasa_sglang.workloads.models.pretrained import load_config
from fasa_sglang.workloads.models.random_weights import (
    any_chunks,
    config_shape,
    key_spread,
    norm_sizes,
)
from fasa_sglang.workloads.models.shapes import SHAPES, write_shape
from fasa_sglang.workloads.serving.engine import update_weights

# What ``--shape`` accepts.
SHAPE_NAMES = (*SHAPES, "smollm2")


def served_model(shape: str, work: Path) -> tuple[str, dict[str, Any]]:
    """A folder to serve, and the engine arguments that it needs.

    Args:
        shape: One of ``SHAPE_NAMES``.
        work: Where to write the config of a shape with dummy weights.
    """
    if shape not in SHAPES:
        return str(packaged_model(shape)), {}
    write_shape(shape, work / shape)
    return str(work / shape), {"load_format": "dummy", "mem_fraction_static": 0.9}


def write_calibration(model: str, share: Fraction | None, path: Path) -> None:
    """Write a calibration with the right number of chunks, for a benchmark of speed.

    Args:
        model: The folder that ``served_model`` returned.
        share: Share of a head's chunks that a server reads; None for the default.
        path: The file.
    """
    config = load_config(model)
    shape = config_shape(config)
    num_fcs = shape.default_num_fcs if share is None else int(shape.rotation.num_chunks * share)
    any_chunks(shape, num_fcs, key_spread(config)).save(str(path))


def spread_keys(engine: Any, shape: str, model: str) -> None:
    """Give every token of the vocabulary its own hidden state, and so its own keys.

    SGLang's dummy weights, including those of the norms, are so small that the average of attention
    dominates the hidden states: all keys of a request become equal, and so do all scores, which
    does not happen in a real model. Does nothing to a real model.
    """
    if shape not in SHAPES:
        return
    config = load_config(model)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    weights = {"model.embed_tokens.weight": embedding}
    weights |= {name: torch.ones(size) for name, size in norm_sizes(config).items()}
    update_weights(engine, {name: weight.bfloat16() for name, weight in weights.items()})
