"""The calibration file: saved contents are loaded unchanged, and anything else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasa_sglang.calibration_file import FORMAT, MAX_BYTES, METADATA_KEY
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import (
    CalibrationError,
    CalibrationMismatchError,
    FasaError,
    UnsupportedModelError,
)
from fasa_sglang.model_shape import ModelShape
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
        k_scale=torch.rand(num_layers, num_kv_heads, head_dim, generator=generator) + 0.1,
        provenance={"ranker": "separation", "text": "t", "seed": 0, "held_out": {"mass": [0.9]}},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "c.fasa"
    make().save(path)
    return path


def test_load_after_save_returns_equal_contents(saved: Path) -> None:
    original, loaded = make(), DominantFCs.load(saved)
    assert loaded.model == original.model
    assert loaded.num_fcs == original.num_fcs
    assert loaded.provenance == original.provenance
    for name in ("ranking", "score", "k_mean", "k_scale"):
        assert torch.equal(getattr(loaded, name), getattr(original, name))


def test_save_twice_writes_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_dims_are_the_dim_pairs_of_the_best_chunks() -> None:
    dominant = make()
    dims = dominant.dims(2)
    assert dims.shape == (3, 4, 4)
    best, second = dominant.ranking[1, 2, :2].tolist()
    assert dims[1, 2].tolist() == [best, best + 8, second, second + 8]


def test_head_dims_mask_the_best_chunks_of_each_query_head() -> None:
    dominant = make()
    chosen = dominant.head_dims(2)
    assert chosen.shape == (3, 8, 16)
    best, second = dominant.score[1, 5].topk(2).indices.tolist()
    expected = sorted([best, best + 8, second, second + 8])
    assert chosen[1, 5].nonzero().flatten().tolist() == expected
    assert ((chosen == 0) | (chosen == 1)).all()


@pytest.mark.parametrize(("head_dim", "expected"), [(16, 8), (64, 24), (96, 24), (256, 64)])
def test_default_num_fcs_of_a_small_head_is_more_than_half(head_dim: int, expected: int) -> None:
    """With half of a 64-dim head's chunks, perplexity was 2.4 % off and RULER below top-k's."""
    rope = RopeLayout(head_dim, head_dim, False, 1e4)
    assert ModelShape("LlamaForCausalLM", 3, 8, 4, rope).default_num_fcs == expected


@pytest.mark.parametrize("num_fcs", [0, -1, 9])
def test_dims_with_a_bad_number_of_chunks_is_refused(num_fcs: int) -> None:
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
def test_for_rank_divides_heads_as_sglang_does(tp_size: int, expected: list[list[int]]) -> None:
    dominant = make()
    for rank, heads in enumerate(expected):
        part = dominant.for_rank(rank, tp_size)
        assert torch.equal(part.ranking, dominant.ranking[:, heads])
        assert torch.equal(part.k_scale, dominant.k_scale[:, heads])
        queries = torch.arange(8).chunk(tp_size)[rank]
        assert torch.equal(part.score, dominant.score[:, queries])


def test_for_rank_with_an_uneven_division_is_refused() -> None:
    with pytest.raises(CalibrationError, match="4 KV heads cannot be divided among 3"):
        make().for_rank(0, 3)


def test_check_model_of_the_same_model_passes() -> None:
    make().check_model(make().model, "c.fasa")


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
def test_check_model_of_another_model_names_both_values(
    change: dict[str, object], words: tuple[str, ...]
) -> None:
    other = replace(make().model, **change)  # type: ignore[arg-type]
    with pytest.raises(CalibrationMismatchError) as caught:
        make().check_model(other, "c.fasa")
    for word in (*words, "c.fasa", "fasa calibrate"):
        assert word in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 8, 200, -1])
def test_load_of_a_truncated_file_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(CalibrationError, match="truncated or not a safetensors file"):
        DominantFCs.load(saved)


def test_load_of_another_file_type_is_refused(saved: Path) -> None:
    saved.write_bytes(b"\x80\x04pickle? no." * 100)
    with pytest.raises(CalibrationError, match="truncated or not a safetensors file"):
        DominantFCs.load(saved)


def test_load_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read .*No such file.*fasa calibrate"):
        DominantFCs.load(tmp_path / "nowhere")


def test_load_of_a_file_without_our_metadata_is_refused(saved: Path) -> None:
    save_file({"weight": torch.zeros(2)}, saved)
    with pytest.raises(CalibrationError, match="without FASA's metadata"):
        DominantFCs.load(saved)


def rewrite(path: Path, about: dict[str, object] | None = None, **tensors: torch.Tensor) -> None:
    """Save the file again with some of its contents replaced."""
    dominant = DominantFCs.load(path)
    metadata = {
        "format": FORMAT,
        "model": dominant.model.to_dict(),
        "num_fcs": dominant.num_fcs,
        "provenance": dominant.provenance,
        **(about or {}),
    }
    save_file({**load_file(path), **tensors}, path, metadata={METADATA_KEY: json.dumps(metadata)})


def test_load_of_another_format_is_refused(saved: Path) -> None:
    rewrite(saved, {"format": 7})
    with pytest.raises(CalibrationError, match=f"format 7, this version reads format {FORMAT}"):
        DominantFCs.load(saved)


def test_load_of_incomplete_metadata_is_refused(saved: Path) -> None:
    rewrite(saved, {"model": {"architecture": "LlamaForCausalLM"}})
    with pytest.raises(CalibrationError, match="broken metadata"):
        DominantFCs.load(saved)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"score": torch.zeros(3, 4, 8)}, "score of shape"),
        ({"ranking": torch.zeros(3, 4, 8, dtype=torch.int32)}, "ranking of shape"),
        ({"ranking": torch.zeros(3, 4, 8, dtype=torch.int16)}, "does not list every chunk once"),
        ({"k_mean": torch.full((3, 4, 16), torch.nan)}, "not finite"),
        ({"extra": torch.zeros(1)}, "broken metadata"),
        ({"k_scale": torch.zeros(3, 4, 16)}, "k_scale with values outside"),
        ({"k_scale": torch.full((3, 4, 16), -1.0)}, "k_scale with values outside"),
        ({"k_scale": torch.full((3, 4, 16), 1e-40)}, "k_scale with values outside"),
        ({"k_scale": torch.full((3, 4, 16), 3e38)}, "k_scale with values outside"),
        ({"k_mean": torch.full((3, 4, 16), -3e38)}, "k_mean with values beyond"),
    ],
    ids=[
        "shape",
        "dtype",
        "not-a-permutation",
        "nan",
        "extra",
        "zero-scale",
        "negative-scale",
        "denormal-scale",
        "huge-scale",
        "huge-mean",
    ],
)
def test_load_of_wrong_tensors_is_refused(
    saved: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    rewrite(saved, **tensors)
    with pytest.raises(CalibrationError, match=f"{message}.*; run: fasa calibrate"):
        DominantFCs.load(saved)


def model_with(**changes: object) -> dict[str, object]:
    """The metadata of ``make``'s model with some fields replaced; RoPE's fields too."""
    values = make().model.to_dict()
    rope = values["rope"]
    for name, value in changes.items():
        (rope if name in rope else values)[name] = value
    return {"model": values}


@pytest.mark.parametrize(
    "about",
    [
        *({"num_fcs": value} for value in (-1, 0, 9, 10**9, 8.5, "8", None, True, [1])),
        {"provenance": None},
        {"provenance": [1]},
        {"model": None},
        {"model": {"rope": 3}},
        model_with(num_layers=3.0),
        model_with(num_layers=10**12),
        model_with(num_kv_heads="4"),
        model_with(num_qo_heads=True),
        model_with(num_qo_heads=-8),
        model_with(architecture=None),
        model_with(head_dim="16"),
        model_with(rotary_dim=[16]),
        model_with(interleaved="no"),
        model_with(theta=None),
        model_with(scaling=[1]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_load_of_hostile_metadata_is_refused_in_one_sentence(
    saved: Path, about: dict[str, object]
) -> None:
    rewrite(saved, about)
    with pytest.raises(CalibrationError, match="run: fasa calibrate") as caught:
        DominantFCs.load(saved)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_load_of_deeply_nested_metadata_is_refused(saved: Path) -> None:
    nested = '{"format": ' + "[" * 99_999 + "]" * 99_999 + "}"
    save_file(load_file(saved), saved, metadata={METADATA_KEY: nested})
    with pytest.raises(CalibrationError, match="broken metadata"):
        DominantFCs.load(saved)


@pytest.mark.parametrize("text", ["null", "[]", "3", "{}"])
def test_load_of_metadata_without_a_format_is_refused(saved: Path, text: str) -> None:
    save_file(load_file(saved), saved, metadata={METADATA_KEY: text})
    with pytest.raises(CalibrationError, match="broken metadata"):
        DominantFCs.load(saved)


def test_load_of_null_metadata_is_refused(saved: Path) -> None:
    header = b'{"__metadata__":null}   '
    saved.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CalibrationError, match=r"without FASA's metadata|not a safetensors file"):
        DominantFCs.load(saved)


def test_load_of_a_file_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.fasa"
    with path.open("wb") as file:
        file.truncate(60 * 2**30)
    with pytest.raises(CalibrationError, match=f"expected a calibration of at most {MAX_BYTES:,}"):
        DominantFCs.load(path)


@pytest.mark.parametrize("path", ["/dev/zero", "/tmp"])
def test_load_of_a_device_or_folder_is_refused(path: str) -> None:
    with pytest.raises(CalibrationError, match="is not a regular file"):
        DominantFCs.load(path)


@pytest.mark.parametrize("name", ["score", "k_mean", "k_scale"])
def test_save_of_contents_that_load_refuses_is_refused(tmp_path: Path, name: str) -> None:
    broken = getattr(make(), name).clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=f"LlamaForCausalLM holds {name} .*not finite"):
        replace(make(), **{name: broken}).save(tmp_path / "c.fasa")
    assert not list(tmp_path.iterdir())


def test_save_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match=r"cannot write .*No such file or directory"):
        make().save(tmp_path / "missing" / "c.fasa")


@pytest.mark.parametrize("layer_types", [["sliding_attention"], ["full", "sliding_attention"]])
def test_shape_with_sliding_layers_is_refused(layer_types: list[str]) -> None:
    config = SimpleNamespace(model_type="llama", architectures=["M"], layer_types=layer_types)
    with pytest.raises(UnsupportedModelError, match=r"M has layers of type .*sliding_attention, "):
        ModelShape.from_config(config)


@pytest.mark.parametrize(("window", "warnings"), [(256, 1), (None, 0)])
def test_shape_with_an_ignored_window_logs_one_warning(
    caplog: pytest.LogCaptureFixture, window: int | None, warnings: int
) -> None:
    config = SimpleNamespace(
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        rope_theta=1e4,
        sliding_window=window,
    )
    ModelShape.from_config(config)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings
    if warnings:
        assert "MistralForCausalLM has a sliding window of 256 tokens" in caplog.text
