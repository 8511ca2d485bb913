"""The sparse-index planner without SGLang: labels and queries in, attention over 512 tokens out.

Needs a CUDA GPU and FlashInfer: python examples/planner.py
"""

import torch

from fasa_sglang.flashinfer_ext.buffers import PlannerBuffers
from fasa_sglang.flashinfer_ext.lane import Lane
from fasa_sglang.flashinfer_ext.planner import SparseIndexPlanner
from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS
from fasa_sglang.ops.layer_labels import LayerLabels

HQ, HKV, D, NUM_FCS, LENS = 32, 8, 128, 32, [4000, 9000]
shape = {"num_qo_heads": HQ, "num_kv_heads": HKV, "head_dim": D, "dtype": torch.bfloat16}
torch.set_default_device("cuda")
torch.manual_seed(0)

# A paged KV cache with pages of one token. Request 0 owns slots 1 to 4000, request 1 the next.
kv_cache = tuple(torch.randn(1 + sum(LENS), HKV, D, dtype=torch.bfloat16) for _ in range(2))
slots = torch.arange(1, 1 + sum(LENS), dtype=torch.int32)
# Any chunks serve random keys; a calibration file names the dominant ones of a model.
dims = torch.arange(2 * NUM_FCS, dtype=torch.int32).expand(HKV, -1).contiguous()
mean, scale = torch.zeros(HKV, 2 * NUM_FCS), torch.ones(HKV, 2 * NUM_FCS)
fp8 = LABEL_FORMATS["fp8"]
labels = LayerLabels(fp8.pack(kv_cache[0], dims.long(), mean, scale), dims, scale, fp8)

buffers = PlannerBuffers(
    max_batch_size=2, max_kv_len=16384, max_budget=512, combine="nrm", device="cuda", **shape
)
workspace = torch.empty(128 * 2**20, dtype=torch.uint8)
planner = SparseIndexPlanner(
    workspace, batch_size=2, paged_kv_indices_buffer=slots, buffers=buffers, **shape
)
lanes = [Lane(budget=512), Lane(budget=256)]
planner.plan(lanes, LENS)  # once per decode step
q = torch.randn(2, HQ, D, dtype=torch.bfloat16)
out = planner.run(q, kv_cache, labels, sm_scale=D**-0.5)  # once per layer

# The same step in float32. The planner rounds scores to float16, so it may choose differently
# between tokens at the edge of the budget.
for b, (lane, own_slots) in enumerate(zip(lanes, slots.split(LENS), strict=True)):
    expected = reference.fasa_decode(
        q[b : b + 1],
        *kv_cache,
        labels,
        own_slots[None],
        torch.tensor([LENS[b]]),
        budget=lane.budget,
        sink=lane.sink,
        recent=lane.recent,
        sm_scale=D**-0.5,
        combine="nrm",
    )
    error = float((out[b] - expected[0]).norm() / expected.norm())
    print(f"request {b}: {lane.budget} of {LENS[b]} tokens, relative error {error:.3f}")
    assert error < 0.1
