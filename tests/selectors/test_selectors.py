"""Properties of every selector, for each entry of the registry."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import pytest
import torch

from fasa_sglang import selectors
from fasa_sglang.backend.attention.compared_lanes import best_positions
from fasa_sglang.config import FasaConfig
from fasa_sglang.errors import ConfigError, RequestError
from fasa_sglang.ops import reference
from fasa_sglang.ops.label_format import LABEL_FORMATS
from fasa_sglang.ops.layer_labels import LayerLabels
from fasa_sglang.requests import parse_request
from fasa_sglang.selectors import SELECTORS, DecodeView

SEQ_LENS = [70, 5, 33, 17]
HQ, HKV, D, NUM_SLOTS = 6, 2, 8, 200
EVERY = pytest.mark.parametrize("name", SELECTORS)


def batch_view(lanes: slice = slice(None)) -> DecodeView:
    """Random keys with two of four chunks in their labels; ``lanes`` keeps part of the batch."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(SEQ_LENS), HQ, D, generator=generator)
    k_cache = torch.randn(NUM_SLOTS, HKV, D, generator=generator)
    order = torch.randperm(NUM_SLOTS, generator=generator)
    slots = torch.zeros(len(SEQ_LENS), max(SEQ_LENS), dtype=torch.int64)
    for b, length in enumerate(SEQ_LENS):
        slots[b, :length] = order[sum(SEQ_LENS[:b]) :][:length]
    dims = torch.tensor([[0, 2, 4, 6], [1, 2, 5, 6]])
    ones = torch.ones(dims.shape)
    bf16 = LABEL_FORMATS["bf16"]
    labels = LayerLabels(bf16.pack(k_cache, dims, 0 * ones, ones), dims.int(), ones, bf16)
    seq_lens = torch.tensor(SEQ_LENS)[lanes]
    q, slots = q[lanes], slots[lanes, : int(seq_lens.max())]

    def label_scores() -> torch.Tensor:
        return reference.token_importance(
            q, labels, slots, seq_lens, sm_scale=D**-0.5, combine="nrm"
        )

    return DecodeView(
        q=q,
        k_cache=k_cache,
        slots=slots,
        seq_lens=seq_lens,
        label_scores=label_scores,
        head_dims=(torch.arange(HQ)[:, None] + torch.arange(D) % 4 < 4).float(),
        sm_scale=D**-0.5,
        combine="nrm",
        seeds=[11, 12, 13, 14][lanes],
    )


def selected(
    name: str, view: DecodeView, *, budget: int, sink: int, recent: int
) -> list[list[set[int]]]:
    """Selected positions of each request and KV head."""
    scores = SELECTORS[name].scores(view)
    positions, lens = reference.select_tokens(
        scores, view.seq_lens, budget=budget, sink=sink, recent=recent
    )
    return [
        [set(positions[b, h, : lens[b, h]].tolist()) for h in range(HKV)]
        for b in range(len(positions))
    ]


def test_registry_has_one_selector_per_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(selectors.__path__)} - {"base"}
    assert set(SELECTORS) == modules
    for name in modules:
        module = importlib.import_module(f"fasa_sglang.selectors.{name}")
        assert type(SELECTORS[name]).__module__ == module.__name__


@EVERY
def test_selector_describes_itself(name: str) -> None:
    selector = SELECTORS[name]
    assert selector.name == name
    assert selector.summary and "\n" not in selector.summary
    assert selector.source == "" or selector.source.startswith("https://")


@EVERY
def test_scores_are_finite_up_to_the_length_and_minus_infinity_beyond(name: str) -> None:
    view = batch_view()
    scores = SELECTORS[name].scores(view)
    assert scores.shape == (len(SEQ_LENS), HKV, max(SEQ_LENS))
    assert scores.dtype == torch.float32
    for b, length in enumerate(SEQ_LENS):
        # FASA has no label of the current token yet.
        assert scores[b, :, : length - 1].isfinite().all()
        assert (scores[b, :, length:] == -torch.inf).all()


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "fasa"])
def test_selector_selects_other_tokens_than_fasa(name: str) -> None:
    """Random keys, half of whose chunks the labels leave out, and a budget of a few tokens."""
    own = selected(name, batch_view(), budget=12, sink=2, recent=2)
    fasa = selected("fasa", batch_view(), budget=12, sink=2, recent=2)
    for b, length in enumerate(SEQ_LENS):
        if length > 12:
            assert own[b] != fasa[b]


@EVERY
@pytest.mark.parametrize(
    ("budget", "sink", "recent"), [(16, 4, 3), (16, 0, 0), (1, 0, 0), (99, 4, 3)]
)
def test_batch_selects_what_each_request_selects_alone(
    name: str, budget: int, sink: int, recent: int
) -> None:
    view = batch_view()
    together = best_positions(
        SELECTORS[name].scores(view), view.seq_lens, budget=budget, sink=sink, recent=recent
    )
    assert together.shape == (len(SEQ_LENS), HKV, min(budget, max(SEQ_LENS)))
    for b, length in enumerate(SEQ_LENS):
        alone = selected(name, batch_view(slice(b, b + 1)), budget=budget, sink=sink, recent=recent)
        for h in range(HKV):
            assert set(together[b, h, : min(budget, length)].tolist()) == alone[0][h]


@EVERY
def test_padding_slots_are_not_read(name: str) -> None:
    """Slots past a request's end may be of any other request, or of none."""
    view = batch_view()
    padding = torch.arange(view.max_len) >= view.seq_lens[:, None]
    other = dataclasses.replace(view, slots=view.slots.masked_fill(padding, NUM_SLOTS - 1))
    assert torch.equal(SELECTORS[name].scores(view), SELECTORS[name].scores(other))


def test_unknown_selector_raises_and_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"selector.*{'.*'.join(SELECTORS)}.*'nope'"):
        FasaConfig(selector="nope")
    config = FasaConfig(selector="any")
    with pytest.raises(RequestError, match=f"selector.*{'.*'.join(SELECTORS)}.*'nope'"):
        parse_request({"fasa": {"selector": "nope"}}, config, 10)
