"""Every kernel through Triton's compiler for an H100, which needs none.

The interpreter takes what the compiler refuses: ``nrm`` once assigned tiles of two shapes to one
name, ran here and failed on the first GPU.
"""

from __future__ import annotations

import kernel_cases
import pytest
import torch
import triton
from kernel_cases import INTERPRETED, make_case, scored
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fasa_sglang.ops import reference

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here"),
]

# As in test_kernels: num_kv_heads, group, head_dim, label width; and the labels' type
SHAPES = [
    ((8, 4, 128, 64), torch.float8_e4m3fn),
    ((8, 4, 128, 64), torch.bfloat16),
    ((8, 4, 128, 48), torch.float8_e4m3fn),
    ((2, 7, 64, 32), torch.float8_e4m3fn),
    ((4, 8, 256, 128), torch.float8_e4m3fn),
    ((3, 1, 64, 8), torch.bfloat16),
]


class Hopper:
    """What Triton's compiler asks a GPU's driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels are compiled where they would be launched; collects their names."""
    names: list[str] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, **kwargs: object) -> object:
        names.append(self.__name__)
        return run(self, *args, **{**kwargs, "warmup": True})

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    return names


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_kernels_of_a_decode_step(
    shape: tuple[int, int, int, int], dtype: torch.dtype, compiled: list[str]
) -> None:
    from fasa_sglang.ops.label_write import KeyPool, write_labels
    from fasa_sglang.ops.token_selection import SelectionBuffers, select_tokens

    case = make_case((300, 7), *shape)
    labels = torch.zeros(1, len(case.k), *case.dims.shape, dtype=torch.uint8).to(dtype)
    write_labels(
        KeyPool([case.k]), case.dims[None], case.mean[None], case.scale[None], case.packed, labels
    )
    for combine in reference.COMBINE_RULES:
        buffers = scored(case, labels[0], combine, sink=4, recent=32)
    indices = torch.zeros(2 * shape[0], 64, dtype=torch.int32)
    arguments = [case.packed, case.starts, case.seq_lens]
    arguments += [case.ints(64), case.ints(4), case.ints(32)]
    arguments += [SelectionBuffers(buffers), indices, shape[0]]
    select_tokens(buffers, *arguments)
    counts = torch.zeros(len(case.k), dtype=torch.int32)
    select_tokens(buffers, *arguments, wanted=counts, counted=case.ints(1))
    assert set(compiled) == {
        "_label_write_kernel",
        "_importance_kernel",
        "_guess_kernel",
        "_collect_kernel",
        "_settle_kernel",
    }


def test_kernels_of_memory_mode(compiled: list[str]) -> None:
    from fasa_sglang.ops.selection_average import update_averages
    from fasa_sglang.ops.tombstones import close_gaps

    case = make_case((300, 7), 1, 1, 16, 8)
    indptr = torch.tensor([0, 300, 307], dtype=torch.int32)
    close_gaps(case.packed, indptr, case.ints(1))
    counts, average = torch.zeros(400, dtype=torch.int32), torch.zeros(400)
    lanes = [case.packed, indptr, case.ints(5), case.seq_lens, case.ints(1)]
    update_averages(*lanes, counts, average, 8, 0.9)
    assert compiled == ["_close_gaps_kernel", "_average_kernel"]
