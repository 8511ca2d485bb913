"""What each layer does, for whole models and for the stages of a pipeline."""

from __future__ import annotations

from fasa_sglang.layer_plan import LayerKind, LayerPlan

SELECTS, DENSE, OTHER = LayerKind.SELECTS, LayerKind.DENSE, LayerKind.OTHER


def test_of_model_makes_the_first_layers_dense() -> None:
    plan = LayerPlan.of_model([SELECTS] * 5, 2)
    assert plan.kinds == (DENSE,) * 2 + (SELECTS,) * 3
    assert [plan.selects(layer) for layer in range(5)] == [False, False, True, True, True]
    assert plan.selecting == [2, 3, 4]
    assert (plan.first, plan.end, plan.last) == (0, 5, 4)


def test_of_model_counts_only_layers_that_attend_to_everything() -> None:
    """In Gemma-3 the first five layers have a window; the first dense layer is the sixth."""
    plan = LayerPlan.of_model([OTHER, DENSE, OTHER, SELECTS, SELECTS], 2)
    assert plan.kinds == (OTHER, DENSE, OTHER, DENSE, SELECTS)
    assert plan.selecting == [4]


def test_of_model_with_more_dense_layers_than_layers_selects_nowhere() -> None:
    plan = LayerPlan.of_model([SELECTS] * 3, 7)
    assert len(plan.kinds) == 3
    assert plan.selecting == []
    assert plan.rows_attended(100, 10) == 300


def test_stage_holds_its_own_layers_and_knows_the_whole_model() -> None:
    model = LayerPlan.of_model([SELECTS] * 6, 3)
    first, second = model.stage(0, 2), model.stage(2, 6)
    assert first.selecting == [] and second.selecting == [3, 4, 5]
    assert (first.last, second.last) == (1, 5)
    assert second.selects(0) is False and second.selects(5) is True
    # Every stage counts the rows of the model, so that reports do not depend on the pipeline.
    assert first.rows_attended(100, 10) == second.rows_attended(100, 10) == 3 * 100 + 3 * 10


def test_last_is_the_last_layer_that_attends_to_everything() -> None:
    plan = LayerPlan((SELECTS, OTHER, DENSE, OTHER), 0, 4)
    assert plan.last == 2
    assert plan.stage(0, 2).last == 0
    assert plan.stage(3, 4).last == -1


def test_rows_attended_leaves_other_layers_out() -> None:
    plan = LayerPlan((SELECTS, DENSE, OTHER, OTHER, SELECTS), 1, 5)
    assert plan.selecting == [4]
    assert plan.rows_attended(50, 5) == 2 * 5 + 50


def test_only_keeps_the_layers_of_a_calibration() -> None:
    plan = LayerPlan((SELECTS, DENSE, OTHER, SELECTS), 0, 4)
    assert plan.only([0, 1, 2]).kinds == (SELECTS, DENSE, OTHER, DENSE)
