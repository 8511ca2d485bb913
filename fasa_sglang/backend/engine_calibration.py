"""The engine calibrates the model that it serves, before it takes requests.

Two texts are prefilled through the model runner: one ranks the chunks of every head, the other
judges the ranking. Queries are taken in the attention backend and keys from the KV pool, so
whatever the served model does to them (quantised weights, RoPE scaling) is in them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from fasa_sglang.backend.attention.base import FasaBackend
from fasa_sglang.backend.attention.query_samples import QuerySamples
from fasa_sglang.backend.host import full_attention_backend, resolved_args
from fasa_sglang.backend.prefill import Prefill
from fasa_sglang.backend.prefill_backend import fasa_prefills
from fasa_sglang.backend.ranks import gather
from fasa_sglang.backend.rotation_check import rotates
from fasa_sglang.backend.served_calibration import (
    calibration_path,
    has_dummy_weights,
    served_fingerprint,
)
from fasa_sglang.backend.served_model import served_model
from fasa_sglang.calibration import calibrate
from fasa_sglang.calibration.corpus import CHARS_PER_TOKEN, Text, held_out_text
from fasa_sglang.calibration.job import CalibrationJob
from fasa_sglang.calibration.progress import ProgressLines
from fasa_sglang.calibration_cache import create_cache_folder
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError, UnsupportedHostError, UnsupportedModelError
from fasa_sglang.model_shape import ModelShape
from fasa_sglang.output_file import remove_stale_parts, require_writable

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 128
"""Length of the text on which the rotation of keys is checked."""


def calibrate_at_start(*, model_runner: Any, eager_runner: Any, **kwargs: Any) -> None:
    """Calibrate the served model if it has no calibration; a hook that runs before graph capture.

    Captured steps depend on which layers select, and that is known when their keys have been seen.

    Args:
        model_runner: SGLang's ``ModelRunner``.
        eager_runner: Runs its batches without graphs.

    Raises:
        FasaError: The model cannot be calibrated.
    """
    backend = full_attention_backend(model_runner)
    if not isinstance(backend, FasaBackend) or backend.calibrated:
        return
    # The runner gets these attributes when all graphs are captured.
    model_runner.eager_runner = eager_runner
    model_runner.prefill_cuda_graph_runner = model_runner.decode_cuda_graph_runner = None
    with (
        torch.inference_mode(),
        fasa_prefills(model_runner),
        _memory_errors_explained(model_runner),
    ):
        backend.use_calibration(EngineCalibration(model_runner, backend).run())


@contextmanager
def _memory_errors_explained(runner: Any) -> Iterator[None]:
    """Turn an out-of-memory error of the block into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            f"the GPU's memory does not suffice to calibrate {runner.model_config.model_path}; "
            "start with a smaller --chunked-prefill-size or --mem-fraction-static, or run fasa "
            "calibrate with a smaller --tokens and give its file to the server"
        ) from error


class EngineCalibration:
    """One rank's part in calibrating the served model.

    Args:
        runner: SGLang's ``ModelRunner``, ready to serve.
        backend: FASA's attention backend.

    Raises:
        FasaError: The job does not suit the model or the server.
    """

    def __init__(self, runner: Any, backend: FasaBackend) -> None:
        self._runner, self._backend = runner, backend
        self._model = served_model(runner.model_config)
        self._job = CalibrationJob.from_environment() or CalibrationJob()
        if self._job.settings.num_fcs is not None:
            self._model.shape.check_num_fcs(self._job.settings.num_fcs)
        args, parallel = resolved_args(runner.server_args), get_parallel()
        if args.enable_dp_attention:
            raise UnsupportedHostError(
                "FASA does not calibrate with --enable-dp-attention; run fasa calibrate --model "
                f"{runner.model_config.model_path} --out FILE with the other flags once, and start "
                "with FILE as the fasa setting calibration"
            )
        self._first = parallel.pp_rank == parallel.tp_rank == 0
        self._out = Path(self._job.out) if self._job.out else calibration_path(runner)
        if self._first and self._out is not None:
            if self._job.out is None:
                create_cache_folder(self._out.parent)
                remove_stale_parts(self._out.parent)
            require_writable(self._out)
        # The page of the last token is needed whole, and SGLang keeps one slot for padding. A pool
        # of sliding windows may be smaller than that of the other layers.
        allocator = runner.token_to_kv_pool_allocator
        room = min(runner.max_total_num_tokens, allocator.available_size())
        room -= allocator.page_size + 1
        context = min(runner.model_config.context_len, room)
        self._settings = self._job.settings.for_context(context)
        chunk = args.chunked_prefill_size
        self._prefill = Prefill(runner, chunk if chunk and chunk > 0 else context)
        self._progress = ProgressLines() if self._first else None

    def run(self) -> DominantFCs:
        """Calibrate, and keep the file.

        Returns:
            The calibration of the whole model, equal on all ranks.
        """
        begin = time.monotonic()
        text, held_out = self._job.text, held_out_text()
        ids, held_out_ids = self._tokenize(text), self._tokenize(held_out)
        shape = self._checked_shape(ids[:CHECKED_TOKENS])
        dominant = self._ranked(shape, ids)
        settings, num_fcs = self._settings, dominant.num_fcs
        grid = calibrate.quality_grid(shape, num_fcs)
        quality = self._judged(dominant, held_out_ids, grid)
        dominant = replace(
            dominant,
            provenance=calibrate.provenance(settings, text, held_out, grid, quality),
        )
        if self._first and self._out is not None:
            dominant.save(self._out)
        if self._progress is not None:
            self._progress.end(time.monotonic() - begin, self._out)
        return dominant

    def _tokenize(self, text: Text) -> list[int]:
        """The first tokens of a text; random ones for random weights, which may have no tokenizer.

        Raises:
            CalibrationError: The text is too short, or the model has no tokenizer.
        """
        tokens = self._settings.tokens
        assert tokens is not None
        config = self._runner.model_config
        if has_dummy_weights(self._runner):
            generator = torch.Generator().manual_seed(self._settings.seed)
            return torch.randint(config.vocab_size, (tokens,), generator=generator).tolist()
        args = resolved_args(self._runner.server_args)
        try:
            tokenizer = get_tokenizer(
                args.tokenizer_path or config.model_path,
                tokenizer_mode=args.tokenizer_mode,
                trust_remote_code=args.trust_remote_code,
                revision=args.revision,
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CalibrationError(
                f"FASA calibrates {config.model_path} on a text and cannot load its tokenizer "
                f"({reason}); pass --tokenizer-path, or the setting calibration with the file of a "
                "model that has one"
            ) from error
        # Texts are long; tokenize no more of one than any tokenizer needs.
        ids: list[int] = tokenizer.encode(text.content[: CHARS_PER_TOKEN * tokens])[:tokens]
        if len(ids) < tokens:
            raise CalibrationError(
                f"calibration needs {tokens} tokens of text, {text.name} has {len(ids)}; give a "
                "longer --text or a smaller --tokens"
            )
        return ids

    def _checked_shape(self, ids: list[int]) -> ModelShape:
        """The model without the layers whose keys do not rotate as measured.

        Raises:
            UnsupportedModelError: No layer's keys do.
        """
        shape = self._model.shape
        slots = self._prefill.run(ids)
        before = {layer: self._keys(layer, slots).clone() for layer in self._layers(shape)}
        self._prefill.clear()
        slots = self._prefill.run(ids, first_position=1)
        bad = {
            layer
            for layer, keys in before.items()
            if not rotates(keys, self._keys(layer, slots), shape.rotation)
        }
        self._prefill.clear()
        bad = set().union(*gather(bad))
        layers = tuple(layer for layer in shape.layers if layer not in bad)
        if not layers:
            raise UnsupportedModelError(
                f"no layer of {shape.architecture} rotates its keys as its rotary module does "
                f"({shape.rotation.describe()}), and FASA selects by RoPE's frequencies; serve "
                "this model with another attention backend"
            )
        if bad and self._first:
            logger.warning(
                "FASA: layers %s of %s do not rotate their keys and stay dense",
                ", ".join(map(str, sorted(bad))),
                shape.architecture,
            )
        return replace(shape, layers=layers)

    def _ranked(self, shape: ModelShape, ids: list[int]) -> DominantFCs:
        """Rank the chunks on a text; the provenance is still empty."""
        dims, settings = shape.rotation.chunk_dims(), self._settings
        positions = calibrate.sample_positions(settings)
        samples, slots = self._sampled(positions, ids)
        own: dict[int, calibrate.LayerScores] = {}
        layers = self._layers(shape)
        for done, layer in enumerate(layers, start=1):
            keys = self._keys(layer, slots).transpose(0, 1)
            queries = samples.of_layer(layer)
            own[layer] = calibrate.score_layer(queries, keys, dims, positions, settings)
            self._report("ranking", done, len(layers))
        self._prefill.clear()
        score, k_mean, k_scale = self._whole(shape, own)
        return DominantFCs(
            model=shape,
            num_fcs=self._settings.num_fcs or shape.default_num_fcs,
            ranking=calibrate.rank_chunks(score, shape.num_kv_heads),
            score=score,
            k_mean=k_mean,
            k_scale=k_scale,
            fingerprint=served_fingerprint(self._runner),
        )

    def _judged(self, dominant: DominantFCs, ids: list[int], grid: list[int]) -> torch.Tensor:
        """Mean of ``calibrate.judge_layer`` over all layers and heads, ``[3, len(grid)]``."""
        shape, settings = dominant.model, self._settings
        positions = calibrate.sample_positions(settings)
        samples, slots = self._sampled(positions, ids)
        parallel = get_parallel()
        ranking = dominant.for_rank(parallel.attn_tp_rank, parallel.attn_tp_size).ranking
        layers = self._layers(shape)
        own: dict[int, torch.Tensor] = {}
        for done, layer in enumerate(layers, start=1):
            own[layer] = calibrate.judge_layer(
                samples.of_layer(layer),
                self._keys(layer, slots).transpose(0, 1),
                shape.rotation.chunk_dims(),
                positions,
                settings,
                ranking[shape.layers.index(layer)],
                grid,
                samples.sm_scales[layer],
            )
            self._report("judging", done, len(layers))
        self._prefill.clear()
        figures = [own[layer] for own in gather(own) for layer in sorted(own)]
        return torch.stack(figures).mean(dim=0)

    def _sampled(
        self, positions: torch.Tensor, ids: list[int]
    ) -> tuple[QuerySamples, torch.Tensor]:
        """Prefill a text; the queries at some positions, and the slots of its keys."""
        samples = self._backend.sampling = QuerySamples(positions)
        try:
            return samples, self._prefill.run(ids)
        finally:
            self._backend.sampling = None

    def _keys(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Keys of a layer, ``[len(slots), HKV, D]``."""
        return self._runner.token_to_kv_pool.get_key_buffer(layer)[slots]

    def _layers(self, shape: ModelShape) -> list[int]:
        """Layers of the model that this pipeline stage holds and the calibration ranks."""
        plan = self._model.plan
        return [layer for layer in shape.layers if plan.first <= layer < plan.end]

    def _whole(
        self, shape: ModelShape, own: dict[int, calibrate.LayerScores]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All ranks' scores and statistics of keys, one row per layer of the model."""
        parallel = get_parallel()
        # Ranks of equal keys hold the same heads, and the last of them stands for all.
        parts: dict[int, dict[int, calibrate.LayerScores]] = {}
        for tp_rank, scores in gather((parallel.attn_tp_rank, own)):
            for layer, part in scores.items():
                parts.setdefault(layer, {})[tp_rank] = part
        # With more ranks than KV heads, neighbouring ranks hold the same KV head.
        step = max(1, parallel.attn_tp_size // shape.num_kv_heads)
        rows = [[parts[layer][rank] for rank in sorted(parts[layer])] for layer in shape.layers]
        score = torch.stack([torch.cat([part.score for part in row]) for row in rows])
        k_mean = torch.stack([torch.cat([part.k_mean for part in row[::step]]) for row in rows])
        k_scale = torch.stack([torch.cat([part.k_scale for part in row[::step]]) for row in rows])
        return score, k_mean, k_scale

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)
