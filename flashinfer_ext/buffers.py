"""Scratch buffers of a sparse step; nothing in them outlives the step."""

from __future__ import annotations

import torch

from fasa_sglang.ops.token_importance import ScoreBuffers
from fasa_sglang.ops.token_selection import SelectionBuffers


class PlannerBuffers:
    """Buffers for the largest batch; planners of smaller batches use the first rows.

    Args:
        max_batch_size: Largest number of lanes in a batch.
        max_kv_len: Tokens of the longest request.
        num_qo_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: Dims of a head.
        max_budget: Largest budget of a lane, in tokens.
        combine: How a group's query heads are combined, ``nrm`` or ``mean``.
        dtype: Dtype of queries and outputs.
        device: Device of the kernels; ``meta`` only computes ``nbytes``.

    Attributes:
        scores: Scores of all tokens.
        selection: Scratch of the selection.
        indices: ``slot * num_kv_heads + kv_head`` of the selected tokens,
            ``[max_batch_size * num_kv_heads, max_budget]``, int32. All entries are valid indices:
            those that were never written point to slot 0, which no request owns.
        lse: Log-sum-exp of the two passes of a mixed step,
            ``[2, max_batch_size, num_qo_heads]``, float32.
        out: Output of the dense pass, ``[max_batch_size, num_qo_heads, head_dim]``.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_kv_len: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_budget: int,
        combine: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.max_batch_size, self.max_kv_len = max_batch_size, max_kv_len
        self.scores = ScoreBuffers(max_batch_size, num_kv_heads, max_kv_len, combine, device)
        self.selection = SelectionBuffers(self.scores)
        rows = max_batch_size * num_kv_heads
        self.indices = torch.zeros(rows, max_budget, dtype=torch.int32, device=device)
        heads = (max_batch_size, num_qo_heads)
        self.lse = torch.empty(2, *heads, dtype=torch.float32, device=device)
        self.out = torch.empty(*heads, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        own = self.indices.nbytes + self.lse.nbytes + self.out.nbytes
        return own + self.scores.nbytes + self.selection.nbytes
