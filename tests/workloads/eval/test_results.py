"""Rows on disk, their summary, comparisons and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.bootstrap import mean_interval, ratio_interval
from fasa_sglang.workloads.eval.compared import compare
from fasa_sglang.workloads.eval.results import (
    CONDITIONS,
    ROWS,
    Results,
    Row,
    folder_name,
    read_rows,
)
from fasa_sglang.workloads.eval.summary import summarise
from fasa_sglang.workloads.plots import plot_budgets, plot_depths, plot_speedup

RUN_CONDITIONS: dict[str, Any] = {"task": "needle", "limit": 3, "request": {}}


def filled(folder: Path, values: dict[str, list[float]], **changes: Any) -> Results:
    results = Results(folder, {**RUN_CONDITIONS, **changes})
    for setting, column in values.items():
        for i, value in enumerate(column):
            row = Row(str(i), setting, {"accuracy": value}, {}, 100, 10, 0.5, 2.0)
            results.add(row)
    results.close()
    return results


def test_results_of_an_existing_folder_find_its_rows(tmp_path: Path) -> None:
    filled(tmp_path, {"dense": [1.0, 0.0]})
    again = Results(tmp_path, RUN_CONDITIONS)
    row = again.find("1", "dense")
    assert row is not None and row.metrics == {"accuracy": 0.0}
    assert again.find("2", "dense") is None and again.find("1", "fasa-64") is None


def test_results_after_a_crash_drop_the_incomplete_last_line(tmp_path: Path) -> None:
    """Appending to that line would have made two rows unreadable."""
    filled(tmp_path, {"dense": [1.0, 0.0, 1.0]})
    path = tmp_path / ROWS
    path.write_text(path.read_text()[:-1])
    again = Results(tmp_path, RUN_CONDITIONS)
    assert [row.sample for row in again.rows] == ["0", "1"]
    again.add(Row("2", "dense", {"accuracy": 1.0}))
    again.close()
    assert [row.sample for row in read_rows(tmp_path)] == ["0", "1", "2"]


def test_read_rows_with_an_invalid_line_raises(tmp_path: Path) -> None:
    filled(tmp_path, {"dense": [1.0, 0.0]})
    path = tmp_path / ROWS
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(FasaError, match=r"line 1 of .* is not a results row"):
        read_rows(tmp_path)


def test_results_of_other_conditions_raise(tmp_path: Path) -> None:
    filled(tmp_path, {"dense": [1.0]})
    with pytest.raises(FasaError, match=r"other conditions \(limit: 3 and 4\); give another --out"):
        Results(tmp_path, {**RUN_CONDITIONS, "limit": 4})
    assert json.loads((tmp_path / CONDITIONS).read_text())["limit"] == 3
    assert len(read_rows(tmp_path)) == 1


def test_folder_name_differs_between_conditions() -> None:
    names = {folder_name("needle", "a/b", {"limit": limit}) for limit in (1, 2)}
    assert len(names) == 2 and all(name.startswith("needle-b-") for name in names)


def test_summarise_pairs_each_sample_with_its_dense_row() -> None:
    """A setting without some samples must not be compared with the dense rows of those."""
    rows = [Row(str(i), "dense", {"accuracy": float(i % 2)}) for i in range(10)]
    rows += [Row(str(i), "fasa-64", {"accuracy": 0.0}) for i in range(1, 10, 2)]
    rows += [Row(str(i), "fasa-128", {"accuracy": float(i % 2)}) for i in range(10)]
    dense, small, large = summarise(rows, ["accuracy"])
    assert [entry["setting"] for entry in (dense, small, large)] == ["dense", "fasa-64", "fasa-128"]
    assert dense["accuracy"] == 0.5 and "accuracy_difference" not in dense
    assert small["accuracy_difference"] == -1.0
    assert small["accuracy_difference_interval"] == (-1.0, -1.0)
    assert large["accuracy_difference"] == 0.0


def test_mean_interval_contains_the_mean_and_is_reproducible() -> None:
    values = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    low, high = mean_interval(values)
    assert 0 <= low < 0.75 < high <= 1
    assert mean_interval(values) == (low, high)
    assert mean_interval([1.0]) == (1.0, 1.0)


def test_ratio_interval_resamples_pairs() -> None:
    """Resampled separately, equal columns would not always have a ratio of 1."""
    dense = [1.0, 0.0] * 20
    assert ratio_interval(dense, dense) == (1.0, 1.0)
    half = [value / 2 for value in dense]
    assert ratio_interval(half, dense) == (pytest.approx(0.5), pytest.approx(0.5))


def test_compare_pairs_samples_and_names_the_changes(tmp_path: Path) -> None:
    filled(tmp_path / "a", {"dense": [1, 1, 0], "fasa-64": [1, 0, 0]})
    filled(tmp_path / "b", {"dense": [1, 1, 0], "fasa-64": [1, 1, 1]}, request={"sink": 0})
    changed, entries = compare(tmp_path / "a", tmp_path / "b")
    assert changed == {"request.sink": [None, 0]}
    differences = {entry["setting"]: entry["difference"] for entry in entries}
    assert differences == {"dense": 0.0, "fasa-64": pytest.approx(2 / 3)}


def test_compare_of_a_metric_uses_samples_that_have_it_in_both(tmp_path: Path) -> None:
    """Not every sample of cloze has a word that recurs after more than 128 tokens."""
    metrics = {"a": [{"near": 1.0}, {"near": 0.0, "far": 0.0}], "b": [{"near": 1.0}, {"far": 1.0}]}
    for name, rows in metrics.items():
        results = Results(tmp_path / name, RUN_CONDITIONS)
        for i, row in enumerate(rows):
            results.add(Row(str(i), "dense", row))
        results.close()
    _, entries = compare(tmp_path / "a", tmp_path / "b")
    differences = {entry["metric"]: (entry["samples"], entry["difference"]) for entry in entries}
    assert differences == {"near": (1, 0.0), "far": (1, 1.0)}


def test_compare_of_other_conditions_raises(tmp_path: Path) -> None:
    filled(tmp_path / "a", {"dense": [1]})
    filled(tmp_path / "b", {"dense": [1]}, limit=7)
    with pytest.raises(
        FasaError, match=r"not measured under the same conditions \(limit: 3 and 7\)"
    ):
        compare(tmp_path / "a", tmp_path / "b")
    filled(tmp_path / "c", {"fasa-64": [1]})
    with pytest.raises(FasaError, match="no sample and setting in common"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FasaError, match="is not a readable JSON file"):
        compare(tmp_path / "a", tmp_path / "nowhere")


def test_summarise_sorts_selectors_whose_names_contain_dashes() -> None:
    """Such a name used to be taken for a budget."""
    names = ["two-step-128", "fasa-64", "two-step-64", "dense"]
    entries = summarise([Row("0", name, {"kl": 0.1}) for name in names], ["kl"])
    assert [entry["setting"] for entry in entries] == [
        "dense",
        "fasa-64",
        "two-step-64",
        "two-step-128",
    ]


@pytest.mark.parametrize("metric", ["kl", "accuracy"])
def test_plots_have_a_title_readable_labels_and_a_note_on_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))
    )
    names = ("dense", "fasa-64", "fasa-128", "two-step-64")
    rows = [Row(str(i), name, {metric: 0.1 + i}) for name in names for i in range(3)]
    path = tmp_path / "plot.png"
    common = {"title": "a title", "label": "a label", "path": str(path)}
    plot_budgets(summarise(rows, [metric]), metric, **common)
    plot_depths({(0.0, 100): 1.0, (1.0, 200): 0.5}, **common)
    plot_speedup([("batch 1", 1024, 2.0), ("batch 1", 2048, 3.0)], **common)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert [figure.axes[0].get_title() for figure in figures] == ["a title"] * 3
    legend = figures[0].axes[0].get_legend()
    assert legend.get_title().get_text() == "bars: 95 % intervals"
    lines = [text.get_text() for text in legend.get_texts()]
    dense = [] if metric == "kl" else ["dense"]
    assert sorted(lines) == sorted([*dense, "fasa", "two-step"])
    assert figures[0].axes[0].get_ylabel() == figures[2].axes[0].get_ylabel() == "a label"
