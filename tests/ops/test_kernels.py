"""The GPU kernels against the float32 reference; ``kernel_cases`` says how without a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DEVICE,
    INTERPRETED,
    UNTOUCHED,
    Case,
    check_scores,
    check_selection,
    make_case,
    make_labels,
    needs_triton,
    scored,
    written_labels,
)

from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS, LabelFormat

pytestmark = needs_triton

# seq_lens, num_kv_heads, group, head_dim, label width
SMALL = [
    pytest.param((37,), 2, 3, 16, 8, id="B1-L37-HKV2-G3-D16-F8"),
    pytest.param((200, 5, 64), 3, 1, 32, 12, id="B3-L200-HKV3-G1-D32-F12"),
    pytest.param((1, 129, 128), 1, 16, 64, 16, id="B3-L129-HKV1-G16-D64-F16"),
    # The server's default is 32 chunks at a head_dim of 128; labels are 24 to 64 chunks wide.
    pytest.param((150, 2), 8, 4, 128, 64, id="B2-L150-HKV8-G4-D128-F64"),
    pytest.param((70,), 4, 7, 128, 48, id="B1-L70-HKV4-G7-D128-F48"),
    pytest.param((130,), 2, 5, 128, 128, id="B1-L130-HKV2-G5-D128-F128"),
]
# Several blocks of heads, the last one partly empty.
MANY_HEADS = [
    pytest.param((130, 3), 12, 2, 128, 64, id="B2-L130-HKV12-G2-D128-F64"),
    pytest.param((90,), 16, 1, 128, 64, id="B1-L90-HKV16-G1-D128-F64"),
    pytest.param((66,), 40, 1, 128, 64, id="B1-L66-HKV40-G1-D128-F64"),
    pytest.param((70,), 5, 3, 256, 160, id="B1-L70-HKV5-G3-D256-F160"),
]
LARGE = [
    pytest.param((9000, 1, 2048), 8, 4, 128, 64, id="B3-L9000-HKV8-G4-D128-F64"),
    pytest.param((131072, 65000), 8, 4, 128, 64, id="B2-L131072-HKV8-G4-D128-F64"),
    pytest.param((4097,) * 5, 2, 7, 64, 48, id="B5-L4097-HKV2-G7-D64-F48"),
    pytest.param((3000, 70), 4, 8, 256, 128, id="B2-L3000-HKV4-G8-D256-F128"),
    pytest.param((5000, 33), 40, 1, 128, 64, id="B2-L5000-HKV40-G1-D128-F64"),
]
CASES = SMALL if INTERPRETED else SMALL + LARGE
NAMES = ("seq_lens", "num_kv_heads", "group", "head_dim", "width")
# Triton's interpreter reads float8 exactly, but rounds wrongly when it writes it.
ROUNDED = [f for f in LABEL_FORMATS.values() if not INTERPRETED or f.bits == 16]
FORMATS = pytest.mark.parametrize("label_format", LABEL_FORMATS.values(), ids=lambda f: f.name)


@pytest.mark.parametrize("label_format", ROUNDED, ids=lambda f: f.name)
@pytest.mark.parametrize(NAMES, CASES + MANY_HEADS)
def test_write_labels_stores_what_pack_returns(
    seq_lens: tuple[int, ...],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    width: int,
    label_format: LabelFormat,
) -> None:
    case = make_case(seq_lens, num_kv_heads, group, head_dim, width)
    got = written_labels(case, label_format).cache.float()
    expected = make_labels(case, label_format).cache.float()
    # A quotient may fall on the other side of a rounding boundary: one step of the format.
    rtol = 1.04 * torch.finfo(label_format.dtype).eps
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-2, equal_nan=True)


@FORMATS
@pytest.mark.parametrize(NAMES, CASES + MANY_HEADS)
def test_write_labels_stores_representable_values_exactly_and_saturates_others(
    seq_lens: tuple[int, ...],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    width: int,
    label_format: LabelFormat,
) -> None:
    case = make_case(seq_lens, num_kv_heads, group, head_dim, width)
    case.mean.zero_()
    case.scale.fill_(1.0)
    largest = 2 / torch.finfo(label_format.dtype).eps
    case.k.copy_((case.k.float() * 3).round().clamp(-largest, largest))
    case.k[case.packed[0].long()] = 1024.0
    case.k[case.packed[-1].long()] = -1024.0
    owned = case.packed.long()
    got = label_format.read(written_labels(case, label_format).cache, owned).float()
    keys = case.k.gather(-1, case.dims.long().expand(len(case.k), -1, -1)).float()[owned]
    limit = label_format.max_value or torch.inf
    assert torch.equal(got, keys.clamp(-limit, limit))


@FORMATS
@pytest.mark.parametrize("combine", reference.COMBINE_RULES)
@pytest.mark.parametrize(NAMES, CASES + MANY_HEADS)
def test_token_importance_equals_the_reference_on_the_same_labels(
    seq_lens: tuple[int, ...],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    width: int,
    combine: str,
    label_format: LabelFormat,
) -> None:
    case = make_case(seq_lens, num_kv_heads, group, head_dim, width)
    labels = make_labels(case, label_format)
    buffers = scored(case, labels, combine, sink=1, recent=2)
    check_scores(case, labels, buffers, combine, sink=1, recent=2)


@pytest.mark.parametrize("combine", reference.COMBINE_RULES)
@pytest.mark.parametrize("num_kv_heads", [12, 16, 40])
def test_token_importance_in_blocks_of_heads_equals_one_head_at_a_time(
    num_kv_heads: int, combine: str
) -> None:
    case = make_case((75, 9), num_kv_heads, 2, 64, 64)
    labels = make_labels(case, LABEL_FORMATS["fp8"])
    together = scored(case, labels, combine, 1, 2).scores.unflatten(0, (2, num_kv_heads))
    for h in range(num_kv_heads):
        head = slice(h, h + 1)
        alone = Case(
            case.q[:, 2 * h : 2 * h + 2].contiguous(),
            case.k[:, head].contiguous(),
            case.dims[head],
            case.mean[head],
            case.scale[head],
            case.slots,
            case.packed,
            case.starts,
            case.seq_lens,
        )
        own = scored(alone, make_labels(alone, LABEL_FORMATS["fp8"]), combine, 1, 2).scores
        for b, seq_len in enumerate((75, 9)):
            torch.testing.assert_close(
                together[b, h, :seq_len], own[b, :seq_len], rtol=1e-3, atol=1e-3
            )


def select(
    case: Case,
    buffers: object,
    scratch: object,
    budgets: list[int],
    forced: tuple[int, int],
) -> torch.Tensor:
    """Run the selection into indices that are full of ``UNTOUCHED``, wider than any budget."""
    from fasa_sglang.ops.token_selection import select_tokens

    rows = len(case.seq_lens) * case.num_kv_heads
    indices = torch.full((rows, max(budgets) + 3), UNTOUCHED, dtype=torch.int32, device=DEVICE)
    select_tokens(
        buffers,
        case.packed,
        case.starts,
        case.seq_lens,
        torch.tensor(budgets, dtype=torch.int32, device=DEVICE),
        case.ints(forced[0]),
        case.ints(forced[1]),
        scratch,
        indices,
        case.num_kv_heads,
    )
    return indices


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("combine", reference.COMBINE_RULES)
@pytest.mark.parametrize(NAMES, CASES)
def test_select_tokens_selects_exactly_the_best(
    seq_lens: tuple[int, ...],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    width: int,
    combine: str,
    ties: bool,
) -> None:
    """Twice in a row, so that a pass that leaves its scratch dirty is found."""
    from fasa_sglang.ops.token_selection import SelectionBuffers

    case = make_case(seq_lens, num_kv_heads, group, head_dim, width)
    labels = make_labels(case, LABEL_FORMATS["fp8"])
    if ties:
        labels.cache.view(torch.uint8)[1:] = labels.cache.view(torch.uint8)[int(case.slots[0, 0])]
    sink, recent = 2, 3
    largest = max(sink + recent + 1, max(seq_lens) // 8)
    budgets = [largest if b % 2 == 0 else max(largest // 2, 7) for b in range(len(seq_lens))]
    buffers = scored(case, labels, combine, sink, recent)
    scratch = SelectionBuffers(buffers)
    for _ in range(2):
        indices = select(case, buffers, scratch, budgets, (sink, recent))
        check_selection(case, buffers, indices, budgets, (sink, recent))


def test_select_tokens_with_a_guess_that_is_too_high_ranks_the_whole_row() -> None:
    """The sample holds high scores only: in each run of 16 tokens the first eight are better."""
    from fasa_sglang.ops.token_importance import ScoreBuffers
    from fasa_sglang.ops.token_selection import SelectionBuffers

    seq_len, budget = 16384, 9000
    case = make_case((seq_len,), 1, 1, 16, 8)
    buffers = ScoreBuffers(1, 1, seq_len, "mean", DEVICE)
    position = torch.arange(seq_len, device=DEVICE)
    buffers.scores[0] = torch.where(position % 16 < 8, 100.0, 0.0) + position / seq_len
    scratch = SelectionBuffers(buffers)
    indices = select(case, buffers, scratch, [budget], (0, 0))
    assert (buffers.scores[0] >= scratch.guesses[0]).sum() < budget
    check_selection(case, buffers, indices, [budget], (0, 0))


@pytest.mark.parametrize("num_values", [1, 2, 3, 40])
def test_select_tokens_on_rows_of_few_values_does_not_rank_the_whole_row(num_values: int) -> None:
    """All scores tie when keys do, as those of dummy weights and of endless repetitions.

    Such rows were once ranked whole by one block each: 0.25 ms at 32k tokens, in every layer.
    """
    from fasa_sglang.ops.candidates import CAPACITY
    from fasa_sglang.ops.token_importance import ScoreBuffers
    from fasa_sglang.ops.token_selection import SelectionBuffers

    seq_len, budget = 12 * CAPACITY if not INTERPRETED else 2 * CAPACITY + 7, 300
    case = make_case((seq_len,), 1, 1, 16, 8)
    buffers = ScoreBuffers(1, 1, seq_len, "mean", DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    values = torch.randint(num_values, (seq_len,), generator=generator, device=DEVICE)
    buffers.scores[0, :seq_len] = values / 64
    scratch = SelectionBuffers(buffers)
    indices = select(case, buffers, scratch, [budget], (2, 3))
    threshold = buffers.scores[0, 2 : seq_len - 3].topk(budget - 5).values[-1]
    # The guess is the row's own threshold or just below it.
    assert scratch.guesses[0] <= threshold
    assert (buffers.scores[0] > scratch.guesses[0]).sum() <= CAPACITY
    check_selection(case, buffers, indices, [budget], (2, 3))
