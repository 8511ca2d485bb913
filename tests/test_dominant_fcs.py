"""The calibration file: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasa_sglang.dominant_fcs import FORMAT, METADATA_KEY, DominantFCs, ModelShape
from fasa_sglang.errors import CalibrationError, CalibrationMismatchError
from fasa_sglang.rope import RopeLayout


def make(num_layers: int = 3, num_kv_heads: int = 4, head_dim: int = 16) -> DominantFCs:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(num_layers, 2 * num_kv_heads, head_dim // 2, generator=generator)
    groups = score.unflatten(1, (num_kv_heads, 2)).mean(dim=2)
    return DominantFCs(
        model=ModelShape(
            architecture="LlamaForCausalLM",
            num_layers=num_layers,
            num_qo_heads=2 * num_kv_heads,
            num_kv_heads=num_kv_heads,
            rope=RopeLayout(head_dim, head_dim, False, 1e4, {"rope_type": "llama3", "factor": 8.0}),
        ),
        num_fcs=2,
        ranking=groups.argsort(dim=-1, descending=True).to(torch.int16),
        score=score,
        k_mean=torch.rand(num_layers, num_kv_heads, head_dim, generator=generator),
        k_scale=torch.rand(num_layers, num_kv_heads, head_dim, generator=generator),
        provenance={"ranker": "separation", "text": "t", "seed": 0, "held_out": {"mass": [0.9]}},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "c.safetensors"
    make().save(path)
    return path


def test_load_returns_what_was_saved(saved: Path) -> None:
    made, loaded = make(), DominantFCs.load(saved)
    assert loaded.model == made.model
    assert loaded.num_fcs == made.num_fcs
    assert loaded.provenance == made.provenance
    for name in ("ranking", "score", "k_mean", "k_scale"):
        assert torch.equal(getattr(loaded, name), getattr(made, name))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_dims_are_the_pairs_of_the_best_chunks() -> None:
    made = make()
    dims = made.dims(2)
    assert dims.shape == (3, 4, 4)
    best, second = made.ranking[1, 2, :2].tolist()
    assert dims[1, 2].tolist() == [best, best + 8, second, second + 8]


def test_head_dims_are_the_pairs_of_each_query_heads_own_best_chunks() -> None:
    made = make()
    chosen = made.head_dims(2)
    assert chosen.shape == (3, 8, 16)
    best, second = made.score[1, 5].topk(2).indices.tolist()
    expected = sorted([best, best + 8, second, second + 8])
    assert chosen[1, 5].nonzero().flatten().tolist() == expected
    assert ((chosen == 0) | (chosen == 1)).all()


@pytest.mark.parametrize(("head_dim", "expected"), [(16, 8), (64, 24), (96, 24), (256, 64)])
def test_small_heads_are_read_by_more_than_half_of_their_chunks(
    head_dim: int, expected: int
) -> None:
    """Half of a 64-dim head's left perplexity 2.4 % off, and RULER below exact top-k."""
    rope = RopeLayout(head_dim, head_dim, False, 1e4)
    assert ModelShape("LlamaForCausalLM", 3, 8, 4, rope).default_num_fcs == expected


@pytest.mark.parametrize("num_fcs", [0, -1, 9])
def test_dims_refuses_chunks_that_are_not_there(num_fcs: int) -> None:
    with pytest.raises(CalibrationError, match=f"from 1 to the model's 8 .* got {num_fcs}"):
        make().dims(num_fcs)


@pytest.mark.parametrize(
    ("tp_size", "expected"),
    [
        (1, [[0, 1, 2, 3]]),
        (2, [[0, 1], [2, 3]]),
        (4, [[0], [1], [2], [3]]),
        (8, [[h // 2] for h in range(8)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_for_rank_deals_out_heads_as_sglang_does(tp_size: int, expected: list[list[int]]) -> None:
    made = make()
    for rank, heads in enumerate(expected):
        part = made.for_rank(rank, tp_size)
        assert torch.equal(part.ranking, made.ranking[:, heads])
        assert torch.equal(part.k_scale, made.k_scale[:, heads])
        queries = torch.arange(8).chunk(tp_size)[rank]
        assert torch.equal(part.score, made.score[:, queries])


def test_for_rank_refuses_an_uneven_deal() -> None:
    with pytest.raises(CalibrationError, match="4 KV heads cannot be dealt out to 3"):
        make().for_rank(0, 3)


def test_check_model_accepts_its_own() -> None:
    make().check_model(make().model, "c.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 4}, ("num_layers 3", "the model has 4")),
        ({"num_kv_heads": 2}, ("num_kv_heads 4", "the model has 2")),
        ({"architecture": "Qwen2ForCausalLM"}, ("'LlamaForCausalLM'", "'Qwen2ForCausalLM'")),
        ({"rope": RopeLayout(16, 8, False, 1e4)}, ("rotary_dim 16", "the model has 8")),
        ({"rope": RopeLayout(16, 16, True, 1e4)}, ("interleaved False", "the model has True")),
        ({"rope": RopeLayout(16, 16, False, 5e5)}, ("theta 10000.0", "the model has 500000.0")),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_check_model_names_both_values(change: dict[str, object], words: tuple[str, ...]) -> None:
    other = replace(make().model, **change)  # type: ignore[arg-type]
    with pytest.raises(CalibrationMismatchError) as caught:
        make().check_model(other, "c.safetensors")
    for word in (*words, "c.safetensors", "fasa calibrate"):
        assert word in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 8, 200, -1])
def test_load_refuses_a_truncated_file(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(CalibrationError, match="truncated or not a safetensors file"):
        DominantFCs.load(saved)


def test_load_refuses_what_is_not_safetensors(saved: Path) -> None:
    saved.write_bytes(b"\x80\x04pickle? no." * 100)
    with pytest.raises(CalibrationError, match="truncated or not a safetensors file"):
        DominantFCs.load(saved)


def test_load_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read .*No such file.*fasa calibrate"):
        DominantFCs.load(tmp_path / "nowhere")


def test_load_refuses_a_foreign_safetensors_file(saved: Path) -> None:
    save_file({"weight": torch.zeros(2)}, saved)
    with pytest.raises(CalibrationError, match="without FASA's metadata"):
        DominantFCs.load(saved)


def rewrite(path: Path, about: dict[str, object] | None = None, **tensors: torch.Tensor) -> None:
    """Save the file again with parts of it replaced."""
    made = DominantFCs.load(path)
    written = {
        "format": FORMAT,
        "model": made.model.to_dict(),
        "num_fcs": made.num_fcs,
        "provenance": made.provenance,
        **(about or {}),
    }
    save_file({**load_file(path), **tensors}, path, metadata={METADATA_KEY: json.dumps(written)})


def test_load_refuses_another_format(saved: Path) -> None:
    rewrite(saved, {"format": 7})
    with pytest.raises(CalibrationError, match=f"format 7, this version reads format {FORMAT}"):
        DominantFCs.load(saved)


def test_load_refuses_broken_metadata(saved: Path) -> None:
    rewrite(saved, {"model": {"architecture": "LlamaForCausalLM"}})
    with pytest.raises(CalibrationError, match="broken metadata"):
        DominantFCs.load(saved)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"score": torch.zeros(3, 4, 8)}, "score of shape"),
        ({"ranking": torch.zeros(3, 4, 8, dtype=torch.int32)}, "ranking of shape"),
        ({"ranking": torch.zeros(3, 4, 8, dtype=torch.int16)}, "does not name every chunk once"),
        ({"k_mean": torch.full((3, 4, 16), torch.nan)}, "not finite"),
        ({"extra": torch.zeros(1)}, "broken metadata"),
    ],
    ids=["shape", "dtype", "not-a-permutation", "nan", "extra"],
)
def test_load_refuses_wrong_tensors(
    saved: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    rewrite(saved, **tensors)
    with pytest.raises(CalibrationError, match=message):
        DominantFCs.load(saved)
