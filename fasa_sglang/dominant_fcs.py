"""The calibration file: which frequency chunks of every KV head rank tokens like the whole head.

This file is the only thing the offline calibration and the server share.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fasa_sglang.errors import CalibrationError, CalibrationMismatchError, UnsupportedModelError
from fasa_sglang.rope import RopeLayout, rope_layout_from_config

# Raised too where a change of the defaults asks for calibrations anew that were kept by "auto".
FORMAT = 3
# What a head ranks tokens by does not shrink with it: half of a small head's chunks say too little.
LEAST_FCS = 24
# One metadata key: safetensors does not keep the order of several, and equal calibrations
# must be equal byte by byte.
METADATA_KEY = "fasa"


@dataclass(frozen=True)
class ModelShape:
    """What a calibration belongs to: the model's attention, without its weights."""

    architecture: str
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    rope: RopeLayout

    @classmethod
    def from_config(cls, config: Any, interleaved: bool | None = None) -> ModelShape:
        """Read the shape off a Hugging Face config; ``interleaved`` as in ``rope.py``.

        Raises:
            UnsupportedModelError: MLA, sliding windows, or a RoPE that ``rope.py`` refuses.
        """
        get_text_config = getattr(config, "get_text_config", None)
        text = config if get_text_config is None else get_text_config()
        architecture = (getattr(config, "architectures", None) or [text.model_type])[0]
        if getattr(text, "kv_lora_rank", None):
            raise UnsupportedModelError(
                f"{architecture} uses multi-head latent attention, FASA needs one key per KV head; "
                "serve it with another attention backend"
            )
        layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
        if layer_types != {"full_attention"}:
            raise UnsupportedModelError(
                f"{architecture} mixes {', '.join(sorted(layer_types))}, FASA needs full attention "
                "in all layers; serve it with another attention backend"
            )
        num_qo_heads = text.num_attention_heads
        return cls(
            architecture=architecture,
            num_layers=text.num_hidden_layers,
            num_qo_heads=num_qo_heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or num_qo_heads,
            rope=rope_layout_from_config(text, interleaved),
        )

    @property
    def default_num_fcs(self) -> int:
        """Chunks to read per KV head: half of them, but ``LEAST_FCS`` at least if there are."""
        return min(self.rope.num_chunks, max(LEAST_FCS, self.rope.num_chunks // 2))

    def check_num_fcs(self, num_fcs: int) -> None:
        """Refuse a number of chunks that a head does not have.

        Raises:
            CalibrationError: ``num_fcs`` is not within 1 and the number of chunks.
        """
        if not 1 <= num_fcs <= self.rope.num_chunks:
            raise CalibrationError(
                f"num_fcs must be from 1 to the model's {self.rope.num_chunks} frequency chunks, "
                f"got {num_fcs}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        """Inverse of ``to_dict``."""
        return cls(**{**values, "rope": RopeLayout(**values["rope"])})

    def flat(self) -> dict[str, Any]:
        """Every field under its own name, RoPE's included, for comparing one by one."""
        values = self.to_dict()
        rope = values.pop("rope")
        return {**values, **rope}


@dataclass(frozen=True)
class DominantFCs:
    """All frequency chunks of every KV head, best first.

    Args:
        model: The model the ranking belongs to.
        num_fcs: Chunks a server reads unless its configuration says otherwise.
        ranking: Chunk numbers in falling order of the mean ``score`` of a group's query heads,
            ``[num_layers, num_kv_heads, num_chunks]``, int16. A server reads the first ``num_fcs``.
        score: The ranker's value of each chunk for each query head, by chunk number,
            ``[num_layers, num_qo_heads, num_chunks]``, float32.
        k_mean: Mean of every dim of K over the calibration text,
            ``[num_layers, num_kv_heads, head_dim]``, float32; for labels narrower than 8 bits.
        k_scale: Largest absolute deviation from ``k_mean``, same shape, float32.
        provenance: How it was made: ranker, text hash, tokens, K, seed, version. JSON types.
    """

    model: ModelShape
    num_fcs: int
    ranking: torch.Tensor
    score: torch.Tensor
    k_mean: torch.Tensor
    k_scale: torch.Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def dims(self, num_fcs: int) -> torch.Tensor:
        """The head dims of the best ``num_fcs`` chunks, chunk by chunk.

        Returns:
            ``[num_layers, num_kv_heads, 2 * num_fcs]``, int64.

        Raises:
            CalibrationError: ``num_fcs`` is not within 1 and the number of chunks.
        """
        self.model.check_num_fcs(num_fcs)
        return self.model.rope.chunk_dims()[self.ranking[..., :num_fcs].long()].flatten(-2)

    def head_dims(self, num_fcs: int) -> torch.Tensor:
        """1 at the head dims of the best ``num_fcs`` chunks of every query head, 0 elsewhere.

        Returns:
            ``[num_layers, num_qo_heads, head_dim]``, float32.
        """
        best = self.score.argsort(dim=-1, descending=True, stable=True)[..., :num_fcs]
        dims = self.model.rope.chunk_dims()[best].flatten(-2)
        chosen = torch.zeros(*dims.shape[:2], self.model.rope.head_dim)
        return chosen.scatter_(-1, dims, 1.0)

    def check_model(self, shape: ModelShape, path: str | Path) -> None:
        """Refuse to serve ``shape`` with the calibration of another model.

        Raises:
            CalibrationMismatchError: Names every field that differs, with both values.
        """
        mine, theirs = self.model.flat(), shape.flat()
        differing = [
            f"{name} {mine[name]!r} but the model has {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]
        if differing:
            raise CalibrationMismatchError(
                f"{path} was calibrated for {'; '.join(differing)}; "
                "run: fasa calibrate --model <the served model>"
            )

    def for_rank(self, tp_rank: int, tp_size: int) -> DominantFCs:
        """The KV heads of one tensor-parallel rank, as SGLang deals them out.

        With more ranks than KV heads each head is held by ``tp_size / num_kv_heads`` ranks.

        Raises:
            CalibrationError: The heads cannot be dealt out evenly.
        """
        total = self.model.num_kv_heads
        if max(total, tp_size) % min(total, tp_size):
            raise CalibrationError(
                f"{total} KV heads cannot be dealt out to {tp_size} tensor-parallel ranks; "
                f"choose a --tp-size that divides {total} or that {total} divides"
            )
        per_rank = max(1, total // tp_size)
        start = tp_rank * total // tp_size
        held = slice(start, start + per_rank)
        num_queries = self.model.num_qo_heads // tp_size
        return replace(
            self,
            ranking=self.ranking[:, held],
            k_mean=self.k_mean[:, held],
            k_scale=self.k_scale[:, held],
            score=self.score[:, tp_rank * num_queries : (tp_rank + 1) * num_queries],
        )

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file; equal contents give equal bytes."""
        tensors = {
            name: getattr(self, name).contiguous()
            for name in ("k_mean", "k_scale", "ranking", "score")
        }
        about = {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "num_fcs": self.num_fcs,
            "provenance": self.provenance,
        }
        data = save(tensors, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})
        Path(path).write_bytes(data)

    @classmethod
    def load(cls, path: str | Path) -> DominantFCs:
        """Read a file that ``save`` wrote.

        Raises:
            CalibrationError: There is no such file, or it is truncated, corrupt, of another
                format, or its tensors contradict its metadata.
        """
        again = "run: fasa calibrate --model <model> --out <file>"
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise CalibrationError(
                f"cannot read the calibration file {path} ({error.strerror}); {again}"
            ) from error
        try:
            tensors = load(data)
            header_size = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
        except (SafetensorError, ValueError) as error:
            raise CalibrationError(
                f"{path} is truncated or not a safetensors file ({error}); {again}"
            ) from error
        if METADATA_KEY not in metadata:
            raise CalibrationError(
                f"{path} is a safetensors file without FASA's metadata, expected one written by "
                f"fasa calibrate; {again}"
            )
        try:
            about = json.loads(metadata[METADATA_KEY])
            if about["format"] != FORMAT:
                raise CalibrationError(
                    f"{path} has calibration format {about['format']}, this version reads format "
                    f"{FORMAT}; {again}"
                )
            model = ModelShape.from_dict(about["model"])
            loaded = cls(model, about["num_fcs"], provenance=about["provenance"], **tensors)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(f"{path} has broken metadata ({error!r}); {again}") from error
        loaded._check_tensors(path, again)
        return loaded

    def _check_tensors(self, path: str | Path, again: str) -> None:
        heads = (self.model.num_layers, self.model.num_kv_heads)
        chunks, head_dim = self.model.rope.num_chunks, self.model.rope.head_dim
        expected = {
            "ranking": ((*heads, chunks), torch.int16),
            "score": ((heads[0], self.model.num_qo_heads, chunks), torch.float32),
            "k_mean": ((*heads, head_dim), torch.float32),
            "k_scale": ((*heads, head_dim), torch.float32),
        }
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CalibrationError(
                    f"{path} holds {name} of shape {tuple(tensor.shape)} and {tensor.dtype}, "
                    f"expected {shape} and {dtype}; {again}"
                )
            if not torch.isfinite(tensor).all():
                raise CalibrationError(
                    f"{path} holds {name} with values that are not finite; {again}"
                )
        permutation = torch.arange(chunks, dtype=torch.int16).expand(*heads, -1)
        if not torch.equal(self.ranking.sort(dim=-1).values, permutation):
            raise CalibrationError(
                f"{path} holds a ranking that does not name every chunk once; {again}"
            )
