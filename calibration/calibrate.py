"""``fasa calibrate``: a model and a text become a ``DominantFCs`` file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.progress import Progress

from fasa_sglang import __version__
from fasa_sglang.calibration.capture import Consumer, capture_qk
from fasa_sglang.calibration.corpus import Text
from fasa_sglang.calibration.rankers import RANKERS, rank_statistics, selection_quality
from fasa_sglang.dominant_fcs import DominantFCs, ModelShape
from fasa_sglang.errors import CalibrationError


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate.

    Args:
        ranker: What orders the chunks; see ``rankers.rank_statistics``.
        num_fcs: Chunks a server reads unless it is told otherwise; None takes
            ``ModelShape.default_num_fcs``.
        tokens: Length of the text, in tokens of the model.
        top_k: K of the rankers and of the held-out figures, in tokens.
        num_queries: Decode-like queries sampled from the second half of the text.
        seed: Seed of that sample.

    Raises:
        CalibrationError: A value is out of its range.
    """

    ranker: str = "deviation"
    num_fcs: int | None = None
    tokens: int = 4096
    top_k: int = 256
    num_queries: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranker not in RANKERS:
            raise CalibrationError(
                f"ranker must be one of {', '.join(RANKERS)}, got {self.ranker!r}"
            )
        if self.top_k < 1 or self.num_queries < 1 or self.tokens < 4 * self.top_k:
            raise CalibrationError(
                "calibration needs top_k and num_queries of at least 1 and at least 4 * top_k "
                f"tokens, got top_k {self.top_k}, num_queries {self.num_queries} and tokens "
                f"{self.tokens}"
            )


def load_model(path: str, device: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer for calibration: float32 on a CPU, bfloat16 on a GPU.

    Raises:
        CalibrationError: There is no such model.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(
            f"cannot load the model {path} ({reason}); expected a Hugging Face folder or hub name"
        ) from error
    return model.eval().to(device), tokenizer


def calibrate(
    model: Any,
    tokenizer: Any,
    text: Text,
    held_out: Text,
    settings: CalibrationSettings,
    interleaved: bool | None = None,
    progress: Progress | None = None,
) -> DominantFCs:
    """Rank the frequency chunks of every KV head.

    Args:
        model: A transformers model with ``sdpa`` attention.
        tokenizer: Its tokenizer.
        text: Ranks the chunks.
        held_out: Judges the ranking; figures go into the file's provenance.
        settings: How.
        interleaved: The rotary layout, for a model type that ``rope.py`` does not know.
        progress: Shows a bar for each pass over the layers.

    Returns:
        The calibration; equal arguments give an equal one.

    Raises:
        CalibrationError: A text is too short, or longer than the model's context.
        UnsupportedModelError: The model's attention is not covered.
    """
    shape = ModelShape.from_config(model.config, interleaved)
    chunk_dims = shape.rope.chunk_dims().to(model.device)
    num_fcs = shape.default_num_fcs if settings.num_fcs is None else settings.num_fcs
    shape.check_num_fcs(num_fcs)
    positions = _sample_positions(settings)
    values: list[torch.Tensor] = []
    means: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []

    def rank(layer: int, q: torch.Tensor, k: torch.Tensor, sm_scale: float) -> None:
        ranker = settings.ranker
        statistics = rank_statistics(q, k, chunk_dims, positions, settings.top_k, [ranker])
        values.append(statistics[ranker])
        mean = k.float().mean(dim=1)
        means.append(mean.cpu())
        scales.append((k.float() - mean[:, None]).abs().amax(dim=1).cpu())

    ids = _tokenize(tokenizer, text, settings, model)
    held_out_ids = _tokenize(tokenizer, held_out, settings, model)
    _run(model, ids, rank, _bar(progress, "ranking", shape.num_layers))
    score = torch.stack(values)
    groups = score.unflatten(1, (shape.num_kv_heads, -1)).mean(dim=2)
    # Stable, so that equal scores keep RoPE's order on every machine.
    ranking = groups.argsort(dim=-1, descending=True, stable=True)

    grid = sorted({max(1, shape.rope.num_chunks // part) for part in (8, 4, 2)} | {num_fcs})
    sums = {name: torch.zeros(len(grid)) for name in ("agreement", "mass", "oracle_mass")}

    def judge(layer: int, q: torch.Tensor, k: torch.Tensor, sm_scale: float) -> None:
        quality = selection_quality(
            q, k, chunk_dims, positions, settings.top_k, ranking[layer], grid, sm_scale
        )
        for name, value in quality.items():
            sums[name].add_(value / shape.num_layers)

    _run(model, held_out_ids, judge, _bar(progress, "judging", shape.num_layers))
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
            "tokens": settings.tokens,
            "top_k": settings.top_k,
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


def _sample_positions(settings: CalibrationSettings) -> torch.Tensor:
    """Queries with at least half of the text before them, in rising order."""
    half = settings.tokens // 2
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randperm(settings.tokens - half, generator=generator)[: settings.num_queries]
    return (drawn + half).sort().values


def _tokenize(
    tokenizer: Any, text: Text, settings: CalibrationSettings, model: Any
) -> torch.Tensor:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", settings.tokens)
    if settings.tokens > context:
        raise CalibrationError(
            f"calibration over {settings.tokens} tokens needs a context of as many, the model has "
            f"{context}; pass a smaller --tokens"
        )
    # Enough characters for any tokenizer, and no more: these texts are long.
    content = text.content[: 16 * settings.tokens]
    ids = tokenizer(content, return_tensors="pt").input_ids[0, : settings.tokens]
    if len(ids) < settings.tokens:
        raise CalibrationError(
            f"calibration needs {settings.tokens} tokens of text, {text.name} has {len(ids)}; give "
            "a longer --text or a smaller --tokens"
        )
    return ids.to(model.device)


def _run(model: Any, ids: torch.Tensor, consume: Consumer, step: Callable[[], None]) -> None:
    """One forward pass without the LM head, ``consume`` called and the bar moved per layer."""

    def consume_and_step(layer: int, q: torch.Tensor, k: torch.Tensor, sm_scale: float) -> None:
        consume(layer, q, k, sm_scale)
        step()

    with torch.inference_mode(), capture_qk(consume_and_step):
        model.base_model(input_ids=ids[None], use_cache=False)


def _bar(progress: Progress | None, name: str, total: int) -> Callable[[], None]:
    """A function that moves a new bar of ``progress`` by one; without one it does nothing."""
    if progress is None:
        return lambda: None
    task = progress.add_task(name, total=total)
    return lambda: progress.advance(task)
