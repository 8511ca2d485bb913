"""Every kernel through Triton's compiler, for GPUs that need not be present.

The interpreter accepts code that the compiler refuses: ``nrm`` once assigned tiles of two shapes
to one name, ran in the interpreter and failed on the first GPU. The compiler also says how much
shared memory a kernel needs, which differs by GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import kernel_cases
import pytest
import torch
import triton
from kernel_cases import INTERPRETED, Case, make_case, make_labels, scored
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS, LabelFormat

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here"),
]

# Shared memory that a thread block can use, in bytes, by compute capability.
# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
NUM_KV_HEADS = (1, 2, 3, 5, 8, 12, 16, 32, 40, 64)
# As in test_kernels: num_kv_heads, group, head_dim, label width.
SHAPES = [
    ((8, 4, 128, 64), "fp8"),
    ((8, 4, 128, 64), "bf16"),
    ((8, 4, 128, 48), "fp8"),
    ((2, 7, 64, 32), "fp8"),
    ((4, 8, 256, 128), "fp8"),
    ((40, 1, 128, 64), "fp8"),
    ((3, 1, 64, 8), "bf16"),
]


class Driver:
    """The part of a GPU's driver that Triton's compiler uses."""

    def __init__(self) -> None:
        self.capability = 90

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Compiler:
    """Compiles kernels where they would be launched.

    Attributes:
        driver: Chooses the GPU.
        shared: Shared memory of every kernel that was compiled, in bytes, by name.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.shared: dict[str, int] = {}

    def run(self, kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        compiled = RUN(kernel, *args, **{**kwargs, "warmup": True})
        self.shared[kernel.__name__] = compiled.metadata.shared


RUN = JITFunction.run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    driver = Driver()
    compiler = Compiler(driver)

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        compiler.run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    yield compiler


def compile_decode_step(case: Case, label_format: LabelFormat) -> None:
    """Every kernel of a layer's decode step, with and without counted selections."""
    from fasa_sglang.ops.label_write import KeyPool, write_labels
    from fasa_sglang.ops.token_selection import SelectionBuffers, select_tokens

    labels = make_labels(case, label_format)
    write_labels(
        KeyPool([case.k]),
        case.dims[None],
        case.mean[None],
        case.scale[None],
        case.packed,
        labels.cache[None],
        label_format,
    )
    for combine in reference.COMBINE_RULES:
        buffers = scored(case, labels, combine, sink=4, recent=32)
    indices = torch.zeros(len(case.seq_lens) * case.num_kv_heads, 64, dtype=torch.int32)
    arguments: list[Any] = [case.packed, case.starts, case.seq_lens]
    arguments += [case.ints(64), case.ints(4), case.ints(32)]
    arguments += [SelectionBuffers(buffers), indices, case.num_kv_heads]
    select_tokens(buffers, *arguments)
    counts = torch.zeros(len(case.k), dtype=torch.int32)
    select_tokens(buffers, *arguments, selection_counts=counts, counted=case.ints(1))


@pytest.mark.parametrize(("shape", "format_name"), SHAPES, ids=str)
def test_kernels_of_a_decode_step_compile_for_hopper(
    shape: tuple[int, int, int, int], format_name: str, compiler: Compiler
) -> None:
    compile_decode_step(make_case((300, 7), *shape), LABEL_FORMATS[format_name])
    assert set(compiler.shared) == {
        "_label_write_kernel",
        "_importance_kernel",
        "_guess_kernel",
        "_collect_kernel",
        "_settle_kernel",
    }


def compile_for_memory_mode(case: Case) -> None:
    from fasa_sglang.ops.selection_average import update_averages
    from fasa_sglang.ops.tombstones import close_gaps

    indptr = torch.tensor([0, 300, 307], dtype=torch.int32)
    close_gaps(case.packed, indptr, case.ints(1))
    counts, average = torch.zeros(400, dtype=torch.int32), torch.zeros(400)
    lanes = [case.packed, indptr, case.ints(5), case.seq_lens, case.ints(1)]
    update_averages(*lanes, counts, average, 8, 0.9)


def test_kernels_of_memory_mode_compile_for_hopper(compiler: Compiler) -> None:
    compile_for_memory_mode(make_case((300, 7), 1, 1, 16, 8))
    assert set(compiler.shared) == {"_close_gaps_kernel", "_average_kernel"}


def test_kernel_of_attention_sinks_compiles_for_hopper(compiler: Compiler) -> None:
    from fasa_sglang.ops.sink_logits import apply_sink_logits

    apply_sink_logits(torch.zeros(3, 8, 64).bfloat16(), torch.zeros(3, 8), torch.zeros(8))
    assert set(compiler.shared) == {"_sink_kernel"}


# Head dim and label width: 24 to 128 chunks.
WIDTHS = [(64, 48), (64, 64), (128, 64), (128, 96), (128, 128), (256, 48), (256, 160), (256, 256)]
# bf16 tiles are the larger ones, and sm_86 and sm_89 have the least shared memory.
TARGETS = [(86, "bf16"), (80, "bf16"), (89, "bf16"), (89, "fp8"), (90, "bf16"), (90, "fp8")]


@pytest.mark.parametrize("num_kv_heads", NUM_KV_HEADS)
@pytest.mark.parametrize(("capability", "format_name"), TARGETS)
def test_token_importance_fits_the_shared_memory_of_every_gpu(
    capability: int,
    format_name: str,
    num_kv_heads: int,
    compiler: Compiler,
    draw: Callable[[Any, Any], Any],
) -> None:
    """One to 64 KV heads; with as many query heads as models of that size have."""
    strictest = (capability, format_name) == TARGETS[0]
    if not strictest and num_kv_heads not in draw((8, 40), NUM_KV_HEADS):
        pytest.skip("runs with --all")
    widths = draw([(128, 64), (256, 256)] if strictest else [(128, 64)], WIDTHS)
    compiler.driver.capability = capability
    group = max(1, 32 // num_kv_heads)
    for (head_dim, width), combine in itertools.product(widths, reference.COMBINE_RULES):
        case = make_case((70,), num_kv_heads, group, head_dim, width)
        scored(case, make_labels(case, LABEL_FORMATS[format_name]), combine, sink=4, recent=32)
        shared = compiler.shared["_importance_kernel"]
        # The system reserves 1 KiB per block.
        assert shared <= SHARED_MEMORY[capability] - 1024, (head_dim, width, combine)


@pytest.mark.parametrize(("capability", "format_name"), [(80, "bf16"), (86, "bf16"), (89, "fp8")])
def test_every_other_kernel_fits_the_shared_memory_of_every_gpu(
    capability: int, format_name: str, compiler: Compiler
) -> None:
    """At 64 KV heads, the longest rows of labels; the sample of long contexts is the larger one."""
    compiler.driver.capability = capability
    compile_decode_step(make_case((40000,), 8, 4, 16, 8), LABEL_FORMATS[format_name])
    compile_for_memory_mode(make_case((300, 7), 1, 1, 16, 8))
    first = dict(compiler.shared)
    compile_decode_step(make_case((70,), 64, 1, 256, 256), LABEL_FORMATS[format_name])
    assert len(first) == 7
    for name in first:
        shared = max(first[name], compiler.shared[name])
        assert shared <= SHARED_MEMORY[capability] - 1024, name


def test_default_model_is_scored_in_one_block_of_all_heads(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 KV heads with 64 label dims: a tile of 64 tokens by 512 dims, in bounds without masks."""
    launches: list[dict[str, Any]] = []
    run = compiler.run

    def record(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        launches.append(kwargs)
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(compiler, "run", record)
    case = make_case((70,), 8, 4, 128, 64)
    scored(case, make_labels(case, LABEL_FORMATS["fp8"]), "nrm", sink=4, recent=32)
    [launch] = launches
    assert (launch["BT"], launch["HB"], launch["FP"]) == (64, 8, 64)
    assert launch["grid"] == (132 * 3, 1, 1)
