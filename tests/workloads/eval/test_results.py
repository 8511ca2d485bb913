"""Rows on disk, their summary, and what may be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.results import (
    CONDITIONS,
    ROWS,
    Results,
    Row,
    compare,
    folder_name,
    interval,
    read_rows,
    summarise,
)
from fasa_sglang.workloads.plots import plot_budgets, plot_depths

CONDITIONS_OF_A_RUN: dict[str, Any] = {"task": "needle", "limit": 3, "request": {}}


def filled(folder: Path, values: dict[str, list[float]], **changes: Any) -> Results:
    results = Results(folder, {**CONDITIONS_OF_A_RUN, **changes})
    for setting, column in values.items():
        for i, value in enumerate(column):
            row = Row(str(i), setting, {"accuracy": value}, {}, 100, 10, 0.5, 2.0)
            results.add(row)
    results.close()
    return results


def test_a_rerun_finds_what_is_there(tmp_path: Path) -> None:
    filled(tmp_path, {"dense": [1.0, 0.0]})
    again = Results(tmp_path, CONDITIONS_OF_A_RUN)
    found = again.find("1", "dense")
    assert found is not None and found.metrics == {"accuracy": 0.0}
    assert again.find("2", "dense") is None and again.find("1", "fasa-64") is None


def test_a_line_cut_off_by_a_crash_is_asked_for_again(tmp_path: Path) -> None:
    """Appending behind it would have made two rows one unreadable line."""
    filled(tmp_path, {"dense": [1.0, 0.0, 1.0]})
    path = tmp_path / ROWS
    path.write_text(path.read_text()[:-1])
    again = Results(tmp_path, CONDITIONS_OF_A_RUN)
    assert [row.sample for row in again.rows] == ["0", "1"]
    again.add(Row("2", "dense", {"accuracy": 1.0}))
    again.close()
    assert [row.sample for row in read_rows(tmp_path)] == ["0", "1", "2"]


def test_a_broken_line_in_the_middle_is_no_cut(tmp_path: Path) -> None:
    filled(tmp_path, {"dense": [1.0, 0.0]})
    path = tmp_path / ROWS
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(FasaError, match=r"line 1 of .* is no row of results"):
        read_rows(tmp_path)


def test_a_folder_of_other_settings_is_refused_and_named(tmp_path: Path) -> None:
    filled(tmp_path, {"dense": [1.0]})
    with pytest.raises(FasaError, match=r"other settings \(limit: 3 and 4\); give another --out"):
        Results(tmp_path, {**CONDITIONS_OF_A_RUN, "limit": 4})
    assert json.loads((tmp_path / CONDITIONS).read_text())["limit"] == 3
    assert len(read_rows(tmp_path)) == 1


def test_folder_names_tell_conditions_apart() -> None:
    names = {folder_name("needle", "a/b", {"limit": limit}) for limit in (1, 2)}
    assert len(names) == 2 and all(name.startswith("needle-b-") for name in names)


def test_differences_are_paired_with_dense_of_the_same_sample() -> None:
    """A setting that lacks samples must not be compared with dense's other samples."""
    rows = [Row(str(i), "dense", {"accuracy": float(i % 2)}) for i in range(10)]
    rows += [Row(str(i), "fasa-64", {"accuracy": 0.0}) for i in range(1, 10, 2)]
    rows += [Row(str(i), "fasa-128", {"accuracy": float(i % 2)}) for i in range(10)]
    dense, small, large = summarise(rows, ["accuracy"])
    assert [entry["setting"] for entry in (dense, small, large)] == ["dense", "fasa-64", "fasa-128"]
    assert dense["accuracy"] == 0.5 and "accuracy_difference" not in dense
    assert small["accuracy_difference"] == -1.0
    assert small["accuracy_difference_interval"] == (-1.0, -1.0)
    assert large["accuracy_difference"] == 0.0


def test_intervals_hold_the_mean_and_are_the_same_for_the_same_values() -> None:
    values = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    low, high = interval(values)
    assert 0 <= low < 0.75 < high <= 1
    assert interval(values) == (low, high)
    assert interval([1.0]) == (1.0, 1.0)


def test_compare_pairs_folders_and_says_what_was_changed(tmp_path: Path) -> None:
    filled(tmp_path / "a", {"dense": [1, 1, 0], "fasa-64": [1, 0, 0]})
    filled(tmp_path / "b", {"dense": [1, 1, 0], "fasa-64": [1, 1, 1]}, request={"sink": 0})
    changed, entries = compare(tmp_path / "a", tmp_path / "b")
    assert changed == {"request": [{}, {"sink": 0}]}
    differences = {entry["setting"]: entry["difference"] for entry in entries}
    assert differences == {"dense": 0.0, "fasa-64": pytest.approx(2 / 3)}


def test_compare_pairs_what_both_have_of_a_metric(tmp_path: Path) -> None:
    """A sample that comes back to no word after 128 tokens says nothing of such words."""
    said = {"a": [{"near": 1.0}, {"near": 0.0, "far": 0.0}], "b": [{"near": 1.0}, {"far": 1.0}]}
    for name, rows in said.items():
        results = Results(tmp_path / name, CONDITIONS_OF_A_RUN)
        for i, metrics in enumerate(rows):
            results.add(Row(str(i), "dense", metrics))
        results.close()
    _, entries = compare(tmp_path / "a", tmp_path / "b")
    found = {entry["metric"]: (entry["samples"], entry["difference"]) for entry in entries}
    assert found == {"near": (1, 0.0), "far": (1, 1.0)}


def test_compare_refuses_rows_of_other_conditions(tmp_path: Path) -> None:
    filled(tmp_path / "a", {"dense": [1]})
    filled(tmp_path / "b", {"dense": [1]}, limit=7)
    with pytest.raises(FasaError, match=r"not made under the same conditions \(limit: 3 and 7\)"):
        compare(tmp_path / "a", tmp_path / "b")
    filled(tmp_path / "c", {"fasa-64": [1]})
    with pytest.raises(FasaError, match="no sample and setting in common"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FasaError, match="no readable JSON file"):
        compare(tmp_path / "a", tmp_path / "nowhere")


def test_plots_are_drawn(tmp_path: Path) -> None:
    rows = [Row("0", name, {"kl": 0.1}) for name in ("dense", "fasa-64", "fasa-128", "quest-64")]
    plot_budgets(summarise(rows, ["kl"]), "kl", str(tmp_path / "kl.png"))
    plot_depths({(0.0, 100): 1.0, (1.0, 200): 0.5}, "accuracy", "dense", str(tmp_path / "d.png"))
    for name in ("kl", "d"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
