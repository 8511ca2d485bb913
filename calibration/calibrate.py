"""From the queries and keys of a text to a calibration.

The tensors come from the engine that serves the model, where each rank holds a part of the heads
and layers; see ``backend/engine_calibration.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fasa_sglang import __version__
from fasa_sglang.calibration.corpus import Text
from fasa_sglang.calibration.rankers import rank_statistics, selection_quality
from fasa_sglang.calibration.settings import CalibrationSettings
from fasa_sglang.dominant_fcs import MIN_K_SCALE
from fasa_sglang.model_shape import ModelShape

QUALITY_FIGURES = ("agreement", "mass", "oracle_mass")


@dataclass(frozen=True)
class LayerScores:
    """What the text says of one layer's heads.

    Args:
        score: The ranker's value of each chunk for each query head, ``[HQ, C]``, float32.
        k_mean: Mean of every dim of K, ``[HKV, D]``, float32.
        k_scale: Largest absolute deviation from it, 1 for a dim that does not vary; same shape.
    """

    score: torch.Tensor
    k_mean: torch.Tensor
    k_scale: torch.Tensor


def score_layer(
    q: torch.Tensor,
    k: torch.Tensor,
    chunk_dims: torch.Tensor,
    positions: torch.Tensor,
    settings: CalibrationSettings,
) -> LayerScores:
    """Rate the chunks of a layer's heads, and measure its keys.

    Args:
        q: The sampled queries after RoPE, ``[HQ, P, D]``.
        k: The keys of the text after RoPE, ``[HKV, T, D]``.
        chunk_dims: Head dims of each chunk, ``[C, 2]``.
        positions: Positions of the queries, ``[P]``.
        settings: How to calibrate, filled in by ``CalibrationSettings.for_context``.
    """
    assert settings.top_k is not None
    dims, ranker = chunk_dims.to(k.device), settings.ranker
    score = rank_statistics(q, k, dims, positions, settings.top_k, [ranker])[ranker]
    mean = k.float().mean(dim=1)
    spread = (k.float() - mean[:, None]).abs().amax(dim=1).cpu()
    # Labels are divided by the spread, and a zero-padded head has none.
    scale = torch.where(spread < MIN_K_SCALE, 1.0, spread)
    return LayerScores(score, mean.cpu(), scale)


def rank_chunks(score: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Order the chunks of every KV head by the mean score of its query heads.

    Args:
        score: ``[layers, HQ, C]``, float32.
        num_kv_heads: KV heads of a layer.

    Returns:
        Chunks, best first, ``[layers, HKV, C]``, int16.
    """
    groups = score.unflatten(1, (num_kv_heads, -1)).mean(dim=2)
    # A stable sort keeps RoPE's order of equal scores on every machine.
    return groups.argsort(dim=-1, descending=True, stable=True).to(torch.int16)


def judge_layer(
    q: torch.Tensor,
    k: torch.Tensor,
    chunk_dims: torch.Tensor,
    positions: torch.Tensor,
    settings: CalibrationSettings,
    ranking: torch.Tensor,
    grid: list[int],
    sm_scale: float,
) -> torch.Tensor:
    """Judge a layer's ranking on a text that it was not made from.

    Args:
        q, k, chunk_dims, positions, settings: As for ``score_layer``.
        ranking: Chunks of each KV head, best first, ``[HKV, C]``.
        grid: Numbers of chunks to judge.
        sm_scale: Factor of the logits inside the softmax.

    Returns:
        One row for each of ``QUALITY_FIGURES``, ``[3, len(grid)]``, float32.
    """
    assert settings.top_k is not None
    quality = selection_quality(
        q, k, chunk_dims.to(k.device), positions, settings.top_k, ranking, grid, sm_scale
    )
    return torch.stack([quality[name] for name in QUALITY_FIGURES])


def quality_grid(shape: ModelShape, num_fcs: int) -> list[int]:
    """Numbers of chunks to judge: an eighth, a quarter and a half of them, and the default."""
    parts = {max(1, shape.rotation.num_chunks // part) for part in (8, 4, 2)}
    return sorted(parts | {num_fcs})


def sample_positions(settings: CalibrationSettings) -> torch.Tensor:
    """Draw positions of queries from the second half of a text, in ascending order."""
    assert settings.tokens is not None
    half = settings.tokens // 2
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randperm(settings.tokens - half, generator=generator)[: settings.num_queries]
    return (drawn + half).sort().values


def provenance(
    settings: CalibrationSettings,
    text: Text,
    held_out: Text,
    grid: list[int],
    quality: torch.Tensor,
) -> dict[str, Any]:
    """How a calibration was made, in JSON types.

    Args:
        settings: How to calibrate, filled in.
        text: The text that ranked the chunks.
        held_out: The text that judged the ranking.
        grid: Numbers of chunks that were judged.
        quality: Mean of ``judge_layer`` over layers, ``[3, len(grid)]``.
    """
    figures = {
        name: [round(x, 4) for x in row]
        for name, row in zip(QUALITY_FIGURES, quality.tolist(), strict=True)
    }
    return {
        "fasa_sglang": __version__,
        "ranker": settings.ranker,
        "text": text.name,
        "text_sha256": text.sha256,
        "tokens": settings.tokens,
        "top_k": settings.top_k,
        "num_queries": settings.num_queries,
        "seed": settings.seed,
        "held_out": {
            "text": held_out.name,
            "text_sha256": held_out.sha256,
            "num_fcs": grid,
            **figures,
        },
    }
