"""A calibration: which frequency chunks of every KV head rank tokens like the whole head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.calibration_file import REMEDY, read_calibration, write_calibration
from fasa_sglang.errors import CalibrationError, CalibrationMismatchError
from fasa_sglang.model_shape import ModelShape

MAX_KEY = 65504.0
"""Largest magnitude of a key's mean and spread, that of float16."""

MIN_K_SCALE = 1e-6
"""Smallest spread of a dim of K; ``fasa calibrate`` writes 1 for a dim that does not vary."""


@dataclass(frozen=True)
class DominantFCs:
    """The frequency chunks of every KV head, best first, and statistics of the keys.

    Args:
        model: The model that was calibrated. Row ``i`` of the tensors belongs to its layer
            ``model.layers[i]``.
        num_fcs: Default number of chunks that a server reads per KV head.
        ranking: Chunks in descending order of the mean ``score`` of a group's query heads,
            ``[rows, num_kv_heads, num_chunks]``, int16. A server reads the first ``num_fcs``.
        score: The ranker's value of each chunk for each query head, by chunk number,
            ``[rows, num_qo_heads, num_chunks]``, float32.
        k_mean: Mean of every dim of K over the calibration text,
            ``[rows, num_kv_heads, head_dim]``, float32; labels are stored relative to it.
        k_scale: Largest absolute deviation from ``k_mean``, 1 for a dim that does not vary; same
            shape, float32. Narrow label formats divide by it.
        fingerprint: ``weights_fingerprint`` of the model; None if it had no weight files.
        provenance: How the calibration was made: ranker, text and its hash, tokens, K, seed,
            version. JSON types.
    """

    model: ModelShape
    num_fcs: int
    ranking: torch.Tensor
    score: torch.Tensor
    k_mean: torch.Tensor
    k_scale: torch.Tensor
    fingerprint: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def dims(self, num_fcs: int) -> torch.Tensor:
        """Head dims of the best ``num_fcs`` chunks, the two dims of a chunk side by side.

        Returns:
            ``[rows, num_kv_heads, 2 * num_fcs]``, int64.

        Raises:
            CalibrationError: ``num_fcs`` is less than 1 or more than the number of chunks.
        """
        self.model.check_num_fcs(num_fcs)
        return self.model.rotation.chunk_dims()[self.ranking[..., :num_fcs].long()].flatten(-2)

    def head_dims(self, num_fcs: int) -> torch.Tensor:
        """Mask of the head dims of each query head's own best ``num_fcs`` chunks, 1 or 0.

        Returns:
            ``[rows, num_qo_heads, head_dim]``, float32.
        """
        best = self.score.argsort(dim=-1, descending=True, stable=True)[..., :num_fcs]
        dims = self.model.rotation.chunk_dims()[best].flatten(-2)
        chosen = torch.zeros(*dims.shape[:2], self.model.rotation.head_dim)
        return chosen.scatter_(-1, dims, 1.0)

    def check_model(self, shape: ModelShape, fingerprint: str | None, path: str | Path) -> None:
        """Refuse the calibration of another model.

        Args:
            shape: The served model.
            fingerprint: Its ``weights_fingerprint``; None does not compare the weights.
            path: The calibration file, for the message.

        Raises:
            CalibrationMismatchError: The shapes or the weights differ; names what differs.
        """
        differing = self.model.differences(shape)
        known = None not in (fingerprint, self.fingerprint)
        if not differing and known and fingerprint != self.fingerprint:
            differing = [f"weights {self.fingerprint} but the model has {fingerprint}"]
        if differing:
            raise CalibrationMismatchError(
                f"{path} was calibrated for {'; '.join(differing)}; set the server's fasa setting "
                'calibration to "auto", or run: fasa calibrate --model <the served model>'
            )

    def rows(self, layers: Sequence[int]) -> list[int]:
        """Rows of the tensors that belong to layers of the model, which must be among its own."""
        return [self.model.layers.index(layer) for layer in layers]

    def for_rank(self, tp_rank: int, tp_size: int) -> DominantFCs:
        """The part of the calibration that one tensor-parallel rank needs.

        Heads are divided as in SGLang: with more ranks than KV heads, each head is on
        ``tp_size / num_kv_heads`` ranks.

        Raises:
            CalibrationError: The heads cannot be divided evenly.
        """
        total = self.model.num_kv_heads
        if max(total, tp_size) % min(total, tp_size):
            raise CalibrationError(
                f"{total} KV heads cannot be divided among {tp_size} tensor-parallel ranks; "
                f"choose a --tp-size that divides {total} or that {total} divides"
            )
        per_rank = max(1, total // tp_size)
        start = tp_rank * total // tp_size
        heads = slice(start, start + per_rank)
        num_queries = self.model.num_qo_heads // tp_size
        return replace(
            self,
            ranking=self.ranking[:, heads],
            k_mean=self.k_mean[:, heads],
            k_scale=self.k_scale[:, heads],
            score=self.score[:, tp_rank * num_queries : (tp_rank + 1) * num_queries],
        )

    def save(self, path: str | Path) -> None:
        """Write a calibration file; equal contents give equal bytes.

        Raises:
            CalibrationError: ``load`` would refuse the contents.
            FasaError: The file cannot be written.
        """
        problem = self._problem()
        if problem is not None:
            raise CalibrationError(
                f"the calibration of {self.model.architecture} {problem}, and no server would take "
                "it; check the model's weights, or serve it with --dtype float32"
            )
        tensors = {name: getattr(self, name).contiguous() for name in self._tensors()}
        about = {
            "model": self.model.to_dict(),
            "num_fcs": self.num_fcs,
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }
        write_calibration(Path(path), tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> DominantFCs:
        """Read a file that ``save`` wrote.

        Raises:
            CalibrationError: The file cannot be read, has another format, or its contents are
                invalid.
        """
        tensors, about = read_calibration(Path(path))
        try:
            model = ModelShape.from_dict(about["model"])
            loaded = cls(
                model,
                about["num_fcs"],
                fingerprint=about["fingerprint"],
                provenance=about["provenance"],
                **tensors,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} has broken metadata ({error!r:.300}); {REMEDY}"
            ) from error
        problem = loaded._problem()
        if problem is not None:
            raise CalibrationError(f"{path} {problem}; {REMEDY}")
        return loaded

    def _tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype that the model's shape asks of each tensor."""
        heads = (len(self.model.layers), self.model.num_kv_heads)
        chunks, head_dim = self.model.rotation.num_chunks, self.model.rotation.head_dim
        return {
            "k_mean": ((*heads, head_dim), torch.float32),
            "k_scale": ((*heads, head_dim), torch.float32),
            "ranking": ((*heads, chunks), torch.int16),
            "score": ((heads[0], self.model.num_qo_heads, chunks), torch.float32),
        }

    def _problem(self) -> str | None:
        """What is wrong with the contents, as the end of a sentence; None if they are valid."""
        chunks = self.model.rotation.num_chunks
        if type(self.num_fcs) is not int or not 1 <= self.num_fcs <= chunks:
            return (
                f"has num_fcs {self.num_fcs!r:.80}, expected an integer from 1 to the model's "
                f"{chunks} frequency chunks"
            )
        if not isinstance(self.fingerprint, str | None):
            return f"has fingerprint {self.fingerprint!r:.80}, expected a string or null"
        if not isinstance(self.provenance, dict):
            return f"has provenance {self.provenance!r:.80}, expected an object"
        for name, (shape, dtype) in self._tensors().items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                return (
                    f"holds {name} of shape {tuple(tensor.shape)} and {tensor.dtype}, expected "
                    f"{shape} and {dtype}"
                )
            if not torch.isfinite(tensor).all():
                return f"holds {name} with values that are not finite"
        permutation = torch.arange(chunks, dtype=torch.int16).expand_as(self.ranking)
        if not torch.equal(self.ranking.sort(dim=-1).values, permutation):
            return "holds a ranking that does not list every chunk once"
        if (self.k_mean.abs() > MAX_KEY).any():
            return f"holds k_mean with values beyond {MAX_KEY}, expected the means of keys"
        if (self.k_scale < MIN_K_SCALE).any() or (self.k_scale > MAX_KEY).any():
            return (
                f"holds k_scale with values outside {MIN_K_SCALE} to {MAX_KEY}, expected the "
                "positive spreads of keys"
            )
        return None
