"""Rank the frequency chunks of a model on a text, and judge the ranking on another."""

from __future__ import annotations

from typing import Any

import torch

from fasa_sglang import __version__
from fasa_sglang.calibration.capture import Consumer, capture_qk
from fasa_sglang.calibration.corpus import CHARS_PER_TOKEN, Text
from fasa_sglang.calibration.model import context_length
from fasa_sglang.calibration.progress import LayerProgress
from fasa_sglang.calibration.rankers import rank_statistics, selection_quality
from fasa_sglang.calibration.settings import CalibrationSettings
from fasa_sglang.dominant_fcs import MIN_K_SCALE, DominantFCs
from fasa_sglang.errors import CalibrationError
from fasa_sglang.model_shape import ModelShape


def calibrate(
    model: Any,
    tokenizer: Any,
    text: Text,
    held_out: Text,
    settings: CalibrationSettings,
    interleaved: bool | None = None,
    progress: LayerProgress | None = None,
) -> DominantFCs:
    """Rank the frequency chunks of every KV head.

    Args:
        model: A transformers model with ``sdpa`` attention, on one device or on several.
        tokenizer: Its tokenizer.
        text: The text that ranks the chunks.
        held_out: The text that judges the ranking; the figures go into the provenance.
        settings: How to calibrate.
        interleaved: The rotary layout, for a model type that ``rope.py`` does not know.
        progress: Called after every layer of each of the two passes.

    Returns:
        The calibration; equal arguments give equal calibrations.

    Raises:
        CalibrationError: A text is too short, or longer than the model's context.
        UnsupportedModelError: FASA does not support the model's attention.
    """
    shape = ModelShape.from_config(model.config, interleaved)
    settings = settings.for_context(context_length(model))
    assert settings.tokens is not None and settings.top_k is not None
    tokens, top_k = settings.tokens, settings.top_k
    chunk_dims = shape.rope.chunk_dims()
    num_fcs = shape.default_num_fcs if settings.num_fcs is None else settings.num_fcs
    shape.check_num_fcs(num_fcs)
    positions = _sample_positions(tokens, settings.num_queries, settings.seed)
    values: list[torch.Tensor] = []
    means: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []

    def rank(layer: int, q: torch.Tensor, k: torch.Tensor, sm_scale: float) -> None:
        dims, ranker = chunk_dims.to(k.device), settings.ranker
        values.append(rank_statistics(q, k, dims, positions, top_k, [ranker])[ranker])
        mean = k.float().mean(dim=1)
        means.append(mean.cpu())
        spread = (k.float() - mean[:, None]).abs().amax(dim=1).cpu()
        # Labels are divided by the spread, and a zero-padded head has none.
        scales.append(torch.where(spread < MIN_K_SCALE, 1.0, spread))
        if progress is not None:
            progress("ranking", layer + 1, shape.num_layers)

    ids = _tokenize(tokenizer, text, tokens)
    held_out_ids = _tokenize(tokenizer, held_out, tokens)
    _run(model, ids, rank)
    score = torch.stack(values)
    groups = score.unflatten(1, (shape.num_kv_heads, -1)).mean(dim=2)
    # A stable sort keeps RoPE's order of equal scores on every machine.
    ranking = groups.argsort(dim=-1, descending=True, stable=True)

    grid = sorted({max(1, shape.rope.num_chunks // part) for part in (8, 4, 2)} | {num_fcs})
    sums = {name: torch.zeros(len(grid)) for name in ("agreement", "mass", "oracle_mass")}

    def judge(layer: int, q: torch.Tensor, k: torch.Tensor, sm_scale: float) -> None:
        dims = chunk_dims.to(k.device)
        quality = selection_quality(q, k, dims, positions, top_k, ranking[layer], grid, sm_scale)
        for name, value in quality.items():
            sums[name].add_(value / shape.num_layers)
        if progress is not None:
            progress("judging", layer + 1, shape.num_layers)

    _run(model, held_out_ids, judge)
    return DominantFCs(
        model=shape,
        num_fcs=num_fcs,
        ranking=ranking.to(torch.int16),
        score=score,
        k_mean=torch.stack(means),
        k_scale=torch.stack(scales),
        provenance={
            "fasa_sglang": __version__,
            "ranker": settings.ranker,
            "text": text.name,
            "text_sha256": text.sha256,
            "tokens": tokens,
            "top_k": top_k,
            "num_queries": settings.num_queries,
            "seed": settings.seed,
            "held_out": {
                "text": held_out.name,
                "text_sha256": held_out.sha256,
                "num_fcs": grid,
                **{name: [round(x, 4) for x in value.tolist()] for name, value in sums.items()},
            },
        },
    )


def _sample_positions(tokens: int, num_queries: int, seed: int) -> torch.Tensor:
    """Draw positions of queries from the second half of a text, in ascending order."""
    half = tokens // 2
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(tokens - half, generator=generator)[:num_queries]
    return (drawn + half).sort().values


def _tokenize(tokenizer: Any, text: Text, tokens: int) -> torch.Tensor:
    """The first ``tokens`` token ids of a text, ``[tokens]``."""
    # Texts are long; tokenize no more of one than any tokenizer needs.
    content = text.content[: CHARS_PER_TOKEN * tokens]
    ids = tokenizer(content, return_tensors="pt").input_ids[0, :tokens]
    if len(ids) < tokens:
        raise CalibrationError(
            f"calibration needs {tokens} tokens of text, {text.name} has {len(ids)}; give a longer "
            "--text or a smaller --tokens"
        )
    return ids


def _run(model: Any, ids: torch.Tensor, consume: Consumer) -> None:
    """Run the model without its LM head, passing each layer's q and k to ``consume``."""
    # Weights that accelerate keeps outside the GPUs are on no device; its hooks move the ids.
    device = model.get_input_embeddings().weight.device
    if device.type != "meta":
        ids = ids.to(device)
    with torch.inference_mode(), capture_qk(consume):
        model.base_model(input_ids=ids[None], use_cache=False)
