"""How the label cache stores labels: the only place that knows the formats.

To add a format, add an entry to ``LABEL_FORMATS``; the setting ``label_dtype``, pool sizing, the
kernels, the benchmarks and the tests read it. A dtype that Triton cannot convert by itself needs a
branch in ``ops/label_write.py`` and ``ops/token_importance.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LabelFormat:
    """One way to store the dominant dims of a key.

    A label is stored relative to the calibration's mean of its dim. The mean shifts all scores of a
    query by the same amount, which does not change their order, and the scale is folded into the
    query, so reading a label costs neither.

    Args:
        name: Value of the setting ``label_dtype``.
        dtype: Element type of the label cache.
        bits: Bits per label dim.
        scaled: Whether labels are also divided by the calibration's spread of their dim. Formats
            with a narrow range need it.
        max_value: Largest magnitude that ``dtype`` can store; larger values saturate. None if
            saturation cannot happen.
        min_capability: Lowest CUDA compute capability on which Triton can convert ``dtype``.
    """

    name: str
    dtype: torch.dtype
    bits: int
    scaled: bool
    max_value: float | None
    min_capability: tuple[int, int]

    def row_bytes(self, num_fcs: int) -> int:
        """Bytes of the label of one token, for one KV head of one layer."""
        return 2 * num_fcs * self.bits // 8

    def bytes_per_token(self, num_selecting: int, num_kv_heads: int, num_fcs: int) -> int:
        """Bytes that labels add to one token of the KV pool.

        Args:
            num_selecting: Layers that select.
            num_kv_heads: KV heads per layer.
            num_fcs: Chunks per label.
        """
        return num_selecting * num_kv_heads * self.row_bytes(num_fcs)

    def empty_cache(
        self, num_layers: int, num_slots: int, num_kv_heads: int, num_fcs: int, device: torch.device
    ) -> torch.Tensor:
        """A label cache full of zeros, ``[num_layers, num_slots, num_kv_heads, 2 * num_fcs]``."""
        shape = (num_layers, num_slots, num_kv_heads, 2 * num_fcs)
        return torch.zeros(shape, dtype=self.dtype, device=device)

    def pack(
        self,
        k: torch.Tensor,
        dominant_dims: torch.Tensor,
        label_mean: torch.Tensor,
        label_scale: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the labels of keys; the reference of ``ops.label_write``.

        Args:
            k: Keys after RoPE, ``[num_tokens, HKV, D]``.
            dominant_dims: Head dims of the dominant chunks, ``[HKV, F]``, int64.
            label_mean: Subtracted from the keys, ``[HKV, F]``, float32.
            label_scale: Divides the difference, ``[HKV, F]``, float32.

        Returns:
            ``[num_tokens, HKV, F]``, ``dtype``.
        """
        labels = k.gather(-1, dominant_dims.expand(k.shape[0], -1, -1)).float()
        labels = (labels - label_mean) / label_scale
        if self.max_value is not None:
            labels = labels.clamp(-self.max_value, self.max_value)
        return labels.to(self.dtype)

    def unpack(self, labels: torch.Tensor, label_scale: torch.Tensor) -> torch.Tensor:
        """Labels as float32 differences from the mean, shaped like ``labels``."""
        return labels.float() * label_scale

    def read(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """``cache[slots]``, also where PyTorch cannot index ``dtype`` (float8 on a CPU)."""
        return cache.view(torch.uint8)[slots].view(self.dtype)

    def store(self, cache: torch.Tensor, slots: torch.Tensor, labels: torch.Tensor) -> None:
        """``cache[slots] = labels``, also where PyTorch cannot index ``dtype``."""
        cache.view(torch.uint8)[slots] = labels.view(torch.uint8)


LABEL_FORMATS: dict[str, LabelFormat] = {
    label_format.name: label_format
    for label_format in (
        LabelFormat(
            name="fp8",
            dtype=torch.float8_e4m3fn,
            bits=8,
            scaled=True,
            max_value=448.0,
            min_capability=(8, 9),
        ),
        LabelFormat(
            name="bf16",
            dtype=torch.bfloat16,
            bits=16,
            scaled=False,
            max_value=None,
            min_capability=(8, 0),
        ),
    )
}
