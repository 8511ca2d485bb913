"""The GPU kernels against the float32 reference; ``kernel_cases`` says how without a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DEVICE,
    INTERPRETED,
    Case,
    check_selection,
    make_case,
    needs_triton,
    scored,
    written_labels,
)

from fasa_sglang.ops import reference

pytestmark = needs_triton

# seq_lens, num_kv_heads, group, head_dim, label width
SMALL = [
    pytest.param((37,), 2, 3, 16, 8, id="B1-L37-HKV2-G3-D16-F8"),
    pytest.param((200, 5, 64), 3, 1, 32, 12, id="B3-L200-HKV3-G1-D32-F12"),
    pytest.param((1, 129, 128), 1, 16, 64, 16, id="B3-L129-HKV1-G16-D64-F16"),
]
LARGE = [
    pytest.param((9000, 1, 2048), 8, 4, 128, 32, id="B3-L9000-HKV8-G4-D128-F32"),
    pytest.param((131072, 65000), 8, 4, 128, 32, id="B2-L131072-HKV8-G4-D128-F32"),
    pytest.param((4097,) * 5, 2, 7, 64, 32, id="B5-L4097-HKV2-G7-D64-F32"),
    pytest.param((3000, 70), 4, 8, 256, 128, id="B2-L3000-HKV4-G8-D256-F128"),
]
CASES = SMALL if INTERPRETED else SMALL + LARGE
# Triton's interpreter knows no float8.
LABEL_TYPES = [torch.bfloat16, torch.float16]
if not INTERPRETED:
    LABEL_TYPES.append(torch.float8_e4m3fn)
NAMES = ("seq_lens", "num_kv_heads", "group", "head_dim", "width")


@pytest.mark.parametrize("dtype", LABEL_TYPES, ids=str)
@pytest.mark.parametrize(NAMES, CASES)
def test_written_labels_are_the_scaled_dominant_dims(
    seq_lens: tuple[int, ...],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    case = make_case(seq_lens, num_kv_heads, group, head_dim, width)
    labels = written_labels(case, dtype)
    expected = reference.pack_labels(case.k, case.dims.long(), case.mean, case.scale, dtype)
    owned = torch.zeros(len(case.k), dtype=torch.bool, device=DEVICE)
    owned[case.packed.long()] = True
    # One rounding step apart at most: a quotient may fall on the other side of a tie.
    rtol = 0.13 if dtype == torch.float8_e4m3fn else 1e-2
    got = labels.float()
    torch.testing.assert_close(got[owned], expected.float()[owned], rtol=rtol, atol=1e-2)
    assert got[~owned][1:].isnan().all()


@pytest.mark.parametrize("combine", reference.COMBINE_RULES)
@pytest.mark.parametrize(NAMES, CASES)
def test_token_importance_matches_reference(
    seq_lens: tuple[int, ...],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    width: int,
    combine: str,
) -> None:
    from fasa_sglang.ops.token_importance import FORCED

    case = make_case(seq_lens, num_kv_heads, group, head_dim, width)
    labels = written_labels(case, torch.bfloat16)
    got = scored(case, labels, combine, sink=1, recent=2).scores.unflatten(0, (-1, num_kv_heads))
    expected = reference.token_importance(
        case.q,
        labels,
        case.dims.long(),
        case.scale,
        case.slots,
        case.seq_lens,
        sm_scale=case.sm_scale,
        combine=combine,
    )
    for b, seq_len in enumerate(seq_lens):
        free = slice(min(1, seq_len), max(1, seq_len - 2))
        want, have = expected[b, :, free], got[b, :, free]
        if combine == "nrm":
            want = want.view(torch.int32) / 2**23 - 127
        torch.testing.assert_close(have.float(), want, rtol=2e-3, atol=2e-3)
        assert (got[b, :, :1] == FORCED).all()
        assert (got[b, :, max(0, seq_len - 2) : seq_len] == FORCED).all()
        assert got[b, :, seq_len:].isnan().all()


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("combine", reference.COMBINE_RULES)
@pytest.mark.parametrize(NAMES, CASES)
def test_selection_keeps_exactly_the_best(
    seq_lens: tuple[int, ...],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    width: int,
    combine: str,
    ties: bool,
) -> None:
    """Twice in a row, so that a pass that leaves its scratch dirty is found."""
    from fasa_sglang.ops.token_selection import SelectionBuffers, select_tokens

    case = make_case(seq_lens, num_kv_heads, group, head_dim, width)
    labels = written_labels(case, torch.bfloat16)
    if ties:
        labels[1:] = labels[int(case.slots[0, 0])]
    sink, recent = 2, 3
    small = max(sink + recent + 1, max(seq_lens) // 8)
    budgets = [small if b % 2 == 0 else max(small // 2, 7) for b in range(len(seq_lens))]
    buffers = scored(case, labels, combine, sink, recent)
    scratch = SelectionBuffers(buffers)
    for _ in range(2):
        indices = torch.full(
            (len(seq_lens) * num_kv_heads, small + 3), -7, dtype=torch.int32, device=DEVICE
        )
        expected = scored(case, labels, combine, sink, recent)
        buffers.scores.copy_(expected.scores)
        select_tokens(
            buffers,
            case.packed,
            case.starts,
            case.seq_lens,
            torch.tensor(budgets, dtype=torch.int32, device=DEVICE),
            case.ints(sink),
            case.ints(recent),
            scratch,
            indices,
            num_kv_heads,
        )
        check_selection(case, buffers, indices, budgets, (sink, recent))


def test_selection_survives_a_guess_that_is_too_high() -> None:
    """The sample sees only high scores: sectors of eight tokens, one in two of them good."""
    from fasa_sglang.ops.token_importance import ScoreBuffers
    from fasa_sglang.ops.token_selection import SelectionBuffers, select_tokens

    seq_len, budget = 16384, 9000
    case = make_case((seq_len,), 1, 1, 16, 8)
    buffers = ScoreBuffers(1, 1, seq_len, "mean", DEVICE)
    position = torch.arange(seq_len, device=DEVICE)
    buffers.scores[0] = torch.where(position % 16 < 8, 100.0, 0.0) + position / seq_len
    scratch = SelectionBuffers(buffers)
    indices = torch.full((1, budget), -7, dtype=torch.int32, device=DEVICE)
    select_tokens(
        buffers,
        case.packed,
        case.starts,
        case.seq_lens,
        case.ints(budget),
        case.ints(0),
        case.ints(0),
        scratch,
        indices,
        1,
    )
    check_selection(case, buffers, indices, [budget], (0, 0))


@pytest.mark.parametrize("num_values", [1, 2, 3, 40])
def test_rows_of_few_values_are_settled_without_a_second_look(num_values: int) -> None:
    """All scores tie when keys do, as those of dummy weights and of endless repetitions.

    Such rows were once ranked whole by one block each: 0.25 ms at 32k tokens, in every layer.
    """
    from fasa_sglang.ops.token_importance import ScoreBuffers
    from fasa_sglang.ops.token_selection import ROOM, SelectionBuffers, select_tokens

    seq_len, budget = 12 * ROOM if not INTERPRETED else 2 * ROOM + 7, 300
    case = make_case((seq_len,), 1, 1, 16, 8)
    buffers = ScoreBuffers(1, 1, seq_len, "mean", DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    values = torch.randint(num_values, (seq_len,), generator=generator, device=DEVICE)
    buffers.scores[0, :seq_len] = values / 64
    scratch = SelectionBuffers(buffers)
    indices = torch.full((1, budget + 3), -7, dtype=torch.int32, device=DEVICE)
    arguments = (case.packed, case.starts, case.seq_lens, case.ints(budget))
    arguments += (case.ints(2), case.ints(3), scratch, indices, 1)
    select_tokens(buffers, *arguments)
    expected = buffers.scores[0, 2 : seq_len - 3].topk(budget - 5).values[-1]
    # The guess is the row's own threshold or just below it.
    assert scratch.guesses[0] <= expected
    assert (buffers.scores[0] > scratch.guesses[0]).sum() <= ROOM
    check_scores(case, buffers, indices, budget, (2, 3))


def check_scores(case: Case, buffers, indices: torch.Tensor, budget: int, forced) -> None:
    """``check_selection`` for one row whose forced tokens do not carry the forced score."""
    sink, recent = forced
    seq_len = int(case.seq_lens[0])
    position = torch.full((len(case.k),), -1, device=DEVICE)
    position[case.packed.long()] = torch.arange(seq_len, device=DEVICE)
    chosen = torch.zeros(seq_len, dtype=torch.bool, device=DEVICE)
    chosen[position[indices[0, :budget].long()]] = True
    assert int(chosen.sum()) == budget
    assert chosen[:sink].all() and chosen[seq_len - recent :].all()
    free = slice(sink, seq_len - recent)
    score = buffers.scores[0, :seq_len][free]
    assert score[chosen[free]].min() >= score[~chosen[free]].max()
    assert (indices[0, budget:] == -7).all()
