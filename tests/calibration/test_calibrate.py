"""From queries and keys to a calibration: scores, rankings, key statistics, and figures."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fasa_sglang import __version__
from fasa_sglang.calibration import calibrate
from fasa_sglang.calibration.corpus import Text, default_text, held_out_text
from fasa_sglang.calibration.heatmap import save_heatmap
from fasa_sglang.calibration.progress import ProgressLines
from fasa_sglang.calibration.rankers import RANKERS
from fasa_sglang.calibration.settings import CalibrationSettings
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import CalibrationError, FasaError
from fasa_sglang.model_shape import ModelShape
from fasa_sglang.output_file import remove_stale_parts
from fasa_sglang.rope import Rotation
from shapes import make_shape

SETTINGS = CalibrationSettings(tokens=256, top_k=16, num_queries=8)
ROTATION = Rotation.neox(16)
DIMS = ROTATION.chunk_dims()
SHAPE = make_shape(num_layers=2, num_qo_heads=6, num_kv_heads=2, rotation=ROTATION)
POSITIONS = calibrate.sample_positions(SETTINGS)


def random_layer(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries at the sampled positions and keys of the text; keys have a bias in some dims."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(6, len(POSITIONS), 16, generator=generator)
    k = torch.randn(2, 256, 16, generator=generator)
    return q, k * torch.rand(2, 1, 16, generator=generator) + torch.arange(16)


def calibrated(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> DominantFCs:
    """The calibration of a model that has these queries and keys."""
    scores = [calibrate.score_layer(q, k, DIMS, POSITIONS, SETTINGS) for q, k in layers]
    score = torch.stack([layer.score for layer in scores])
    return DominantFCs(
        model=SHAPE,
        num_fcs=3,
        ranking=calibrate.rank_chunks(score, SHAPE.num_kv_heads),
        score=score,
        k_mean=torch.stack([layer.k_mean for layer in scores]),
        k_scale=torch.stack([layer.k_scale for layer in scores]),
    )


def test_score_layer_twice_gives_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        calibrated([random_layer(0), random_layer(1)]).save(tmp_path / name)
    calibrated([random_layer(0), random_layer(2)]).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_layer_k_statistics_are_those_of_the_keys(dtype: torch.dtype) -> None:
    q, k = random_layer(0)
    q, k = q.to(dtype), k.to(dtype)
    scores = calibrate.score_layer(q, k, DIMS, POSITIONS, SETTINGS)
    for head in range(2):
        keys = k[head].double()
        mean = keys.mean(dim=0)
        torch.testing.assert_close(scores.k_mean[head].double(), mean, rtol=1e-5, atol=1e-5)
        spread = (keys - mean).abs().max(dim=0).values
        torch.testing.assert_close(scores.k_scale[head].double(), spread, rtol=1e-5, atol=1e-5)
    assert scores.k_mean.dtype == scores.k_scale.dtype == torch.float32


@pytest.mark.parametrize("ranker", RANKERS)
def test_score_layer_of_a_zero_padded_head_gives_a_file_that_loads(
    tmp_path: Path, ranker: str
) -> None:
    q, k = random_layer(1)
    q[3:], k[1] = 0, 0
    settings = replace(SETTINGS, ranker=ranker)
    padded = calibrate.score_layer(q, k, DIMS, POSITIONS, settings)
    plain = calibrated([random_layer(0), (q, k)])
    score = torch.stack([plain.score[0], padded.score])
    dominant = replace(
        plain,
        ranking=calibrate.rank_chunks(score, 2),
        score=score,
        k_scale=torch.stack([plain.k_scale[0], padded.k_scale]),
    )
    dominant.save(tmp_path / "c.fasa")
    loaded = DominantFCs.load(tmp_path / "c.fasa")
    assert (loaded.k_scale[1, 1] == 1).all()
    assert (loaded.k_scale[1, 0] != 1).all()
    if ranker != "agreement":
        assert loaded.ranking[1, 1].tolist() == list(range(8)), "equal chunks keep RoPE's order"


def test_save_on_a_full_disk_leaves_no_files(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk, at the calibration and at the picture."""
    dominant = replace(calibrated([random_layer(0)] * 2), provenance={"ranker": "deviation"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    out, picture = tmp_path / "c.fasa", tmp_path / "c.fasa.png"
    try:
        with pytest.raises(FasaError, match=rf"cannot write {out} \(File too large\)"):
            dominant.save(out)
        with pytest.raises(FasaError, match=rf"cannot write {picture} \(File too large\)"):
            save_heatmap(dominant, picture)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_rank_chunks_orders_by_the_mean_of_a_group_and_keeps_the_order_of_equals() -> None:
    score = torch.tensor([[[1.0, 5.0, 2.0], [1.0, 0.0, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 3.0]]])
    ranking = calibrate.rank_chunks(score, num_kv_heads=2)
    assert ranking.tolist() == [[[1, 2, 0], [2, 0, 1]]]
    assert ranking.dtype == torch.int16


def test_judge_layer_of_all_chunks_selects_the_true_top_k() -> None:
    q, k = random_layer(0)
    ranking = calibrated([(q, k), (q, k)]).ranking[0]
    rows = calibrate.judge_layer(q, k, DIMS, POSITIONS, SETTINGS, ranking, [1, 8], 0.25)
    agreement, mass, oracle_mass = rows
    assert agreement[1] == 1 > agreement[0]
    assert mass[0] < mass[1] == oracle_mass[1]


@pytest.mark.parametrize(
    ("head_dim", "num_fcs", "expected"),
    [(16, 3, [1, 2, 3, 4]), (64, 24, [4, 8, 16, 24]), (4, 2, [1, 2]), (64, 8, [4, 8, 16])],
)
def test_quality_grid_holds_parts_of_the_chunks_and_the_default(
    head_dim: int, num_fcs: int, expected: list[int]
) -> None:
    shape: ModelShape = make_shape(rotation=Rotation.neox(head_dim))
    assert calibrate.quality_grid(shape, num_fcs) == expected


def test_sample_positions_are_a_seeded_sample_of_the_second_half() -> None:
    positions = POSITIONS.tolist()
    assert len(set(positions)) == 8 and positions == sorted(positions)
    assert positions[0] >= 128 and positions[-1] < 256
    assert torch.equal(calibrate.sample_positions(SETTINGS), POSITIONS)
    assert not torch.equal(calibrate.sample_positions(replace(SETTINGS, seed=1)), POSITIONS)


def test_sample_positions_of_a_short_text_are_all_of_its_second_half() -> None:
    settings = CalibrationSettings(tokens=10, top_k=2, num_queries=32)
    assert calibrate.sample_positions(settings).tolist() == [5, 6, 7, 8, 9]


def test_provenance_tells_texts_settings_and_rounded_figures() -> None:
    text, held_out = Text("a.txt", "one"), Text("b.txt", "two")
    quality = torch.tensor([[0.12345, 1.0], [0.2, 0.3], [0.4, 0.5]])
    provenance = calibrate.provenance(SETTINGS, text, held_out, [2, 8], quality)
    assert provenance == {
        "fasa_sglang": __version__,
        "ranker": "deviation",
        "text": "a.txt",
        "text_sha256": text.sha256,
        "tokens": 256,
        "top_k": 16,
        "num_queries": 8,
        "seed": 0,
        "held_out": {
            "text": "b.txt",
            "text_sha256": held_out.sha256,
            "num_fcs": [2, 8],
            "agreement": [0.1235, 1.0],
            "mass": [0.2, 0.3],
            "oracle_mass": [0.4, 0.5],
        },
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranker": "magic"}, "ranker must be one of deviation, separation"),
        ({"tokens": 100, "top_k": 256}, r"tokens must be at least 4 \* top_k = 1024, got 100"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        # Not mistaken for a missing value, which means the default.
        ({"num_fcs": 0}, "num_fcs must be at least 1, got 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSettings(**change)


def test_settings_for_a_context_fit_tokens_and_top_k() -> None:
    assert CalibrationSettings().for_context(131072) == CalibrationSettings(tokens=4096, top_k=256)
    assert CalibrationSettings().for_context(2048) == CalibrationSettings(tokens=2048, top_k=256)
    assert CalibrationSettings().for_context(512) == CalibrationSettings(tokens=512, top_k=128)


def test_settings_beyond_the_context_are_refused() -> None:
    message = "5000 tokens does not fit the 4096 tokens of the model's context or .* --tokens"
    with pytest.raises(CalibrationError, match=message):
        CalibrationSettings(tokens=5000).for_context(4096)


def test_progress_lines_come_every_few_seconds_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(100, 200))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))
    progress = ProgressLines(interval_sec=5)
    for layer in range(1, 13):
        progress("ranking", layer, 12)
    progress.end(12.34, Path("c.fasa"))
    progress.end(12.34, None)
    assert capsys.readouterr().err.splitlines() == [
        "calibration: ranking, layer 1 of 12",
        "calibration: ranking, layer 6 of 12, about 6 s left",
        "calibration: ranking, layer 11 of 12, about 1 s left",
        "calibration: ranking, layer 12 of 12",
        "calibration: done in 12.3 s, wrote c.fasa",
        "calibration: done in 12.3 s, not kept, because the weights are random",
    ]


def test_killed_process_leaves_a_part_file_until_the_next_start(tmp_path: Path) -> None:
    """Parts of running processes and of other hosts stay."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    names = [f".c.fasa.part-{host}-{pid}" for pid in (ended.pid, os.getpid())]
    names.append(f".c.fasa.part-elsewhere-{ended.pid}")
    for name in names:
        (tmp_path / name).touch()
    remove_stale_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


def test_calibrate_smollm2_quarter_of_the_chunks_agrees_with_top_k(
    smollm2_dominant: DominantFCs,
) -> None:
    held_out = smollm2_dominant.provenance["held_out"]
    assert held_out["agreement"][held_out["num_fcs"].index(8)] >= 0.68


def heads_of_smollm2(path: Path, text: Text, positions: torch.Tensor) -> list[Any]:
    """Sampled queries and keys of some of SmolLM2's layers, rotated by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model
    ids = AutoTokenizer.from_pretrained(path).encode(text.content[:20000])[:1024]
    model.layers = model.layers[:13]
    parts: list[torch.Tensor] = []
    for layer in (3, 12):
        attention = model.layers[layer].self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.register_forward_hook(lambda module, args, out: parts.append(out))
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), use_cache=False)
        cos, sin = model.rotary_emb(parts[0], torch.arange(len(ids))[None])
    heads = [part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in parts]
    rotated = [
        apply_rotary_pos_emb(*pair, cos, sin) for pair in zip(heads[::2], heads[1::2], strict=True)
    ]
    return [(q[0][:, positions], k[0]) for q, k in rotated]


def test_judge_layer_of_smollm2_by_agreement_prefers_the_true_pairs(smollm2_path: Path) -> None:
    """With the paper's ranker, RoPE's own pairs beat the adjacent dims of the paper's code."""
    settings = CalibrationSettings("agreement", tokens=1024, top_k=64, num_queries=16)
    positions = calibrate.sample_positions(settings)
    texts = [
        heads_of_smollm2(smollm2_path, text, positions)
        for text in (default_text(), held_out_text())
    ]
    figures = []
    for dims in (Rotation.neox(64).chunk_dims(), torch.arange(64).reshape(32, 2)):
        total = 0.0
        for (q, k), (held_out_q, held_out_k) in zip(*texts, strict=True):
            scores = calibrate.score_layer(q, k, dims, positions, settings)
            ranking = calibrate.rank_chunks(scores.score[None], 3)[0]
            rows = calibrate.judge_layer(
                held_out_q, held_out_k, dims, positions, settings, ranking, [8], 0.125
            )
            total += float(rows[0, 0]) / 2
        figures.append(total)
    assert figures[0] >= 0.65
    assert figures[1] < figures[0] - 0.03
