"""Device buffers of a sparse step that no step leaves anything in."""

from __future__ import annotations

import torch

from fasa_sglang.config import FasaConfig
from fasa_sglang.ops.token_importance import ScoreBuffers
from fasa_sglang.ops.token_selection import SelectionBuffers


class Scratch:
    """Made for the largest batch; smaller ones use its first rows.

    Args:
        batch_size: Most lanes of a batch.
        longest: Tokens of the longest request.
        num_qo_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: Dims of a head.
        config: The server's settings.
        dtype: Of the model.
        device: Where the kernels run.

    Attributes:
        indices: Selected rows of the KV pool, ``[batch_size * num_kv_heads, max_budget]``, int32.
        lse: Of the two passes of a mixed step, ``[2, batch_size, num_qo_heads]``, float32.
        out: Of the dense pass, ``[batch_size, num_qo_heads, head_dim]``.
    """

    def __init__(
        self,
        batch_size: int,
        longest: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        config: FasaConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.batch_size, self.longest = batch_size, longest
        self.scores = ScoreBuffers(batch_size, num_kv_heads, longest, config.combine, device)
        self.selection = SelectionBuffers(self.scores)
        rows = batch_size * num_kv_heads
        # Zero is a valid index: what was never selected reads slot 0, which no request owns.
        self.indices = torch.zeros(rows, config.max_budget, dtype=torch.int32, device=device)
        heads = (batch_size, num_qo_heads)
        self.lse = torch.empty(2, *heads, dtype=torch.float32, device=device)
        self.out = torch.empty(*heads, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        own = self.indices.nbytes + self.lse.nbytes + self.out.nbytes
        return own + self.scores.nbytes + self.selection.nbytes
