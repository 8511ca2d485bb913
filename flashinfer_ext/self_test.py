"""Checks at start that FlashInfer behaves as ``ShrinkableDecode`` needs it to.

Three things that FlashInfer does not document: a last-page length below 1 shortens a row, down to
length 0; ``fast_decode_plan`` takes its row lengths from ``global_override_indptr_cpu``; and one
plan serves any indices of the planned lengths.
"""

from __future__ import annotations

import math

import flashinfer
import torch

from fasa_sglang.flashinfer_ext.shrinkable_decode import PLAN_STEP, SelectedDecode

MAX_TOKENS = 2 * PLAN_STEP
NUM_SLOTS = 1024
# (lengths to plan for or None to keep the plan, lengths of the two rows on the device).
STEPS: tuple[tuple[tuple[int, int] | None, tuple[int, int]], ...] = (
    ((MAX_TOKENS, MAX_TOKENS), (MAX_TOKENS, PLAN_STEP + 1)),
    (None, (0, 3)),
    (None, (PLAN_STEP, 0)),
    ((1, MAX_TOKENS), (1, MAX_TOKENS)),
    (None, (0, PLAN_STEP - 1)),
)
# Relative error of the output. bfloat16 rounds to 0.004.
TOLERANCE = 0.02
# FlashInfer stands in -50000 for the log-sum-exp of no token.
EMPTY_LSE = -1e4


def decode_problem(
    group_size: int, head_dim: int, dtype: torch.dtype, workspace: torch.Tensor
) -> str | None:
    """Run a tiny decode through FlashInfer and compare it with torch.

    It takes milliseconds and compiles no kernel that serving does not use.

    Args:
        group_size: Query heads per KV head.
        head_dim: Dims of a head.
        dtype: Dtype of queries and KV cache, float16 or bfloat16.
        workspace: FlashInfer's float workspace, uint8; overwritten.

    Returns:
        What differs and in which FlashInfer; None if everything agrees.
    """
    device = workspace.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    q = normal(2, group_size, head_dim)
    k, v = normal(NUM_SLOTS, 1, head_dim), normal(NUM_SLOTS, 1, head_dim)
    indices = torch.zeros(2, MAX_TOKENS, dtype=torch.int32, device=device)
    last_page_len = torch.ones(2, dtype=torch.int32, device=device)
    out = torch.empty_like(q)
    lse = torch.empty(2, group_size, dtype=torch.float32, device=device)
    sm_scale = head_dim**-0.5
    decode = SelectedDecode(indices, last_page_len, group_size, 1, head_dim, dtype, workspace)
    for step, (planned, lengths) in enumerate(STEPS):
        for row_indices in indices:
            slots = torch.randperm(NUM_SLOTS, generator=generator, device=device)
            row_indices.copy_(slots[:MAX_TOKENS])
        if planned is not None:
            decode.plan(planned)
        last_page_len.copy_(torch.tensor(lengths, device="cpu") - MAX_TOKENS + 1)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        decode.run(q, k, v, out, sm_scale, lse)
        for row, length in enumerate(lengths):
            chosen = indices[row, :length].long()
            logits = q[row].float() @ k[chosen, 0].float().T * sm_scale
            expected = logits.softmax(dim=-1) @ v[chosen, 0].float()
            error = (out[row].float() - expected).norm() / max(float(expected.norm()), 1.0)
            if length:
                expected_lse = logits.logsumexp(dim=-1) / math.log(2)  # FlashInfer's is to base 2
                good_lse = torch.allclose(lse[row], expected_lse, atol=0.05)
            else:
                good_lse = bool((lse[row] < EMPTY_LSE).all())
            if not (error < TOLERANCE and good_lse):
                return (
                    f"FlashInfer {flashinfer.__version__} with torch {torch.__version__} decodes "
                    f"wrongly: step {step}, row {row} of {length} tokens, relative error "
                    f"{float(error):.3g}, log-sum-exp {'right' if good_lse else 'wrong'}"
                )
    return None
