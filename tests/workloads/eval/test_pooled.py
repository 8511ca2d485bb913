"""Results of several tasks, pooled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.cli import main
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.pooled import pool
from fasa_sglang.workloads.eval.results import Results, Row


def filled(folder: Path, values: dict[str, list[float]], **changes: Any) -> Path:
    results = Results(folder, {"task": folder.name, "limit": 3, "length": 512, **changes})
    for setting, column in values.items():
        for i, value in enumerate(column):
            results.add(Row(str(i), setting, {"score": value}, {}, 100, 10, 0.5, 2.0))
    results.close()
    return folder


def test_pool_weights_samples_of_all_tasks_equally(tmp_path: Path) -> None:
    """Samples of the same name in two tasks are two samples."""
    one = filled(tmp_path / "one", {"dense": [1, 1, 1], "fasa-64": [1, 0, 1], "quest-64": [0]})
    other = filled(tmp_path / "other", {"dense": [1, 0], "fasa-64": [1, 1]}, haystack="noise")
    pooled = pool([one, other], 0.5)
    assert [entry["setting"] for entry in pooled.entries] == ["dense", "fasa-64"]
    dense, fasa = pooled.entries
    assert dense["share_of_dense"] == 1 and dense["samples"] == fasa["samples"] == 5
    assert fasa["score"] == dense["score"] == pytest.approx(0.8) and fasa["share_of_dense"] == 1
    low, high = fasa["share_of_dense_interval"]
    assert low < 1 < high
    assert pooled.tasks["one"] == {"dense": 1, "fasa-64": pytest.approx(2 / 3), "quest-64": 0}


def test_pool_leaves_out_tasks_that_dense_decoding_fails_or_that_have_no_other_setting(
    tmp_path: Path,
) -> None:
    good = filled(tmp_path / "good", {"dense": [1, 1], "fasa-64": [1, 0]})
    bad = filled(tmp_path / "bad", {"dense": [0, 0, 1], "fasa-64": [0, 0, 0]})
    begun = filled(tmp_path / "begun", {"dense": [1, 1]})
    pooled = pool([good, bad, begun], 0.5)
    assert pooled.left_out == {
        "bad": "dense decoding scores 0.333",
        "begun": "it was decoded only densely",
    }
    assert pooled.entries[1]["share_of_dense"] == pytest.approx(0.5)
    with pytest.raises(FasaError, match=r"all tasks are left out .* \(bad: dense decoding scores"):
        pool([bad], 0.9)


def test_pool_of_other_conditions_or_one_task_twice_raises(tmp_path: Path) -> None:
    one = filled(tmp_path / "one", {"dense": [1]})
    longer = filled(tmp_path / "longer", {"dense": [1]}, length=1024)
    with pytest.raises(FasaError, match=r"same conditions .length: 512 and 1024"):
        pool([one, longer], 0)
    again = filled(tmp_path / "again", {"dense": [1]}, task="one")
    with pytest.raises(FasaError, match="the same task"):
        pool([one, again], 0)


def test_eval_pool_prints_draws_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, list[float]] = {"dense": [1, 1], "fasa-64": [1, 0], "fasa-128": [1, 1]}
    folders = [str(filled(tmp_path / name, values)) for name in ("one", "other")]
    assert main(["eval", "pool", *folders, "--out", str(tmp_path / "out")]) == 0
    assert "100.0% (100.0% to 100.0%)" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"score.png", "summary.json"}
    assert main(["eval", "pool", folders[0]]) == 1
    assert "pool takes two or more results folders, got 1" in capsys.readouterr().err
