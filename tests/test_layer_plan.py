"""What each layer does, for whole models and for the stages of a pipeline."""

from __future__ import annotations

from fasa_sglang.layer_plan import LayerKind, LayerPlan


def test_of_model_makes_the_first_layers_dense() -> None:
    plan = LayerPlan.of_model(5, 2)
    assert plan.kinds == (LayerKind.DENSE,) * 2 + (LayerKind.SELECTS,) * 3
    assert [plan.selects(layer) for layer in range(5)] == [False, False, True, True, True]
    assert plan.selecting == [2, 3, 4]
    assert (plan.first, plan.end, plan.last) == (0, 5, 4)


def test_of_model_with_more_dense_layers_than_layers_selects_nowhere() -> None:
    plan = LayerPlan.of_model(3, 7)
    assert len(plan.kinds) == 3
    assert plan.selecting == []
    assert plan.rows_attended(100, 10) == 300


def test_stage_holds_its_own_layers_and_knows_the_whole_model() -> None:
    model = LayerPlan.of_model(6, 3)
    first, second = model.stage(0, 2), model.stage(2, 4)
    assert first.selecting == [] and second.selecting == [3, 4, 5]
    assert (first.last, second.last) == (1, 5)
    assert [second.pool_index(layer) for layer in range(2, 6)] == [0, 1, 2, 3]
    assert second.selects(0) is False and second.selects(5) is True
    # Every stage counts the rows of the model, so that reports do not depend on the pipeline.
    assert first.rows_attended(100, 10) == second.rows_attended(100, 10) == 3 * 100 + 3 * 10


def test_layers_of_any_order_of_kinds_are_told_apart() -> None:
    """Nothing but ``of_model`` may assume that dense layers come first."""
    selects, dense = LayerKind.SELECTS, LayerKind.DENSE
    plan = LayerPlan((selects, dense, selects, dense, selects), 1, 5)
    assert plan.selecting == [2, 4]
    assert plan.rows_attended(50, 5) == 3 * 5 + 2 * 50
