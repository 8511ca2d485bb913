"""Which tokens may be pruned, how many are, and which ones."""

from __future__ import annotations

from typing import Any

import torch

from fasa_sglang.config import FasaConfig
from fasa_sglang.pruning.importance import Importance
from fasa_sglang.pruning.policy import choose_victims, num_victims, prunable_range
from fasa_sglang.requests import FasaRequest

CONFIG = FasaConfig(prune_interval=8, prune_recent=10, prune_grace=4)
REQUEST = FasaRequest(64, 4, 2, prune="generated", prune_budget=30)


def range_of(
    request: FasaRequest = REQUEST, config: FasaConfig = CONFIG, **changes: Any
) -> tuple[int, int]:
    """The prunable range of a request of 100 tokens, 50 of them its prompt."""
    values: dict[str, Any] = {
        "prompt_len": 50,
        "protected_len": 50,
        "scored_from": 50,
        "seq_len": 100,
        "think_end": None,
    }
    return prunable_range(request, config, **{**values, **changes})


def victims_of(seq_len: int, pruned: int = 0, think_end: int | None = None) -> int:
    start, end = range_of(seq_len=seq_len, think_end=think_end)
    return num_victims(
        REQUEST,
        CONFIG,
        pruned=pruned,
        start=start,
        end=end,
        seq_len=seq_len,
        think_end=think_end,
    )


def test_prunable_range_excludes_prompt_sink_recent_tokens_and_the_radix_tree() -> None:
    assert range_of() == (50, 90)
    assert range_of(prompt_len=2, protected_len=0, scored_from=2) == (4, 90)
    # After a retraction the tree also owns generated tokens.
    assert range_of(protected_len=80, scored_from=80) == (80, 90)
    # A request may ask for more recent tokens than the server keeps.
    assert range_of(FasaRequest(64, 4, 20, prune="generated")) == (50, 80)
    # Where thinking has ended, later tokens are the answer.
    assert range_of(think_end=70) == (50, 70)


def test_prunable_range_at_any_length_holds_only_tokens_scored_by_prune_grace_steps() -> None:
    """Counts the finished sparse steps that scored each token, dense steps before them included."""
    for grace in (0, 1, 4, 30):
        config = FasaConfig(prune_recent=0, prune_grace=grace)
        request = FasaRequest(64, 4, 0, prune="generated")
        for first_sparse_len in (51, 70, 100):
            for seq_len in range(first_sparse_len, 140):
                start, end = range_of(
                    request, config, scored_from=first_sparse_len - 1, seq_len=seq_len
                )
                # The last step may be running. A step scores all tokens but its own.
                scored = [
                    sum(step > position + 1 for step in range(first_sparse_len, seq_len))
                    for position in range(seq_len)
                ]
                assert all(scored[position] >= grace for position in range(start, end))
                if start < end:
                    assert scored[end] < max(grace, 1), "a token is spared for too long"


def test_prunable_range_with_default_settings_is_empty_until_dense_tokens_are_scored() -> None:
    """A prompt of 100 tokens, after which 1,948 tokens are generated densely.

    After one sparse step these were pruned by what former owners had left in their slots.
    """
    config = FasaConfig()
    request = FasaRequest(config.budget, config.sink, config.recent, prune="generated")
    first_sparse_len = config.min_seq_len
    for steps in (1, 2, config.prune_grace, config.prune_grace + 1):
        seq_len = first_sparse_len + steps - 1
        start, end = prunable_range(
            request,
            config,
            prompt_len=100,
            protected_len=100,
            scored_from=first_sparse_len - 1,
            seq_len=seq_len,
            think_end=None,
        )
        finished_steps = steps - 1
        if finished_steps < config.prune_grace:
            assert start == end
        else:
            assert (start, end) == (100, seq_len - config.prune_recent)


def test_num_victims_waits_until_the_budget_is_exceeded_by_an_interval() -> None:
    assert [victims_of(50 + generated) for generated in (10, 30, 37)] == [0, 0, 0]
    assert victims_of(50 + 38) == 8
    assert victims_of(50 + 38 + 7, pruned=8) == 0
    assert victims_of(50 + 38 + 8, pruned=8) == 8
    # The answer does not count towards the budget of the thinking.
    assert victims_of(200, think_end=85) == 0
    assert victims_of(200, think_end=90) == 10


def test_choose_victims_follows_the_rule_and_never_takes_a_tombstone() -> None:
    importance = Importance(20, torch.device("cpu"))
    importance.average[:] = torch.arange(20) / 20
    slots = torch.tensor([7, 0, 3, 12, 0, 5])
    victims = choose_victims(importance, slots, 2, "fasa", 0)
    assert sorted(slots[victims].tolist()) == [3, 5]
    assert sorted(choose_victims(importance, slots, 3, "oldest", 0).tolist()) == [0, 2, 3]
    for seed in range(20):
        chosen = slots[choose_victims(importance, slots, 4, "random", seed)]
        assert sorted(chosen.tolist()) == [3, 5, 7, 12]
