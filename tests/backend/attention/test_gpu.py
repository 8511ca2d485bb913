"""The GPU backend inside SGLang: kinds of decode batches, captured and eager."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fasa_sglang.selectors import SELECTORS
from fasa_sglang.workloads.serving.engine import EAGER, flush_cache, running_engine
from fasa_sglang.workloads.serving.greedy import agreeing_steps, generate, margins
from serving import Agreement

pytestmark = pytest.mark.gpu

LENGTHS = [5, 40, 300, 1000, 2500, 6000, 1, 900]
NEW_TOKENS = 40
COMMON = {
    "skip_tokenizer_init": True,
    "mem_fraction_static": 0.3,
    "cuda_graph_bs_decode": [1, 2, 4, 8],
    "max_running_requests": 8,
}
COVERED = {"budget": 8192}
# Share of steps that have to agree before a reply's first near tie. Replies of the random model
# that attend to the wrong tokens differ within a few steps; a test below shows that they miss it.
MIN_AGREEMENT = 1 / 3
# A step of bfloat16 for logits from 16 to 32, as SmolLM2 has them. Each of two logits may be off by
# one: SGLang's own backend differs from itself at such leads when the same prompts come in another
# order (of 64, 8 at one step and 1 at two).
ROUNDING = 0.125
# ``fasa`` of each lane, by the kind of batch.
BATCHES: dict[str, list[Any]] = {
    "dense": [None] * 8,
    "sparse, covered": [COVERED] * 8,
    "mixed": [
        None,
        COVERED,
        {**COVERED, "prefix": "full"},
        {"budget": 64},
        False,
        COVERED,
        {**COVERED, "prefix": "full"},
        {"budget": 64, "prefix": "full"},
    ],
    "sparse": [{"budget": 64}, {"budget": 100, "sink": 0, "recent": 0}, True, COVERED] * 2,
}


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 8000) for _ in range(length)] for length in LENGTHS]


def attends_to_all(fasa: Any, length: int) -> bool:
    """Whether a request reads every token at every step."""
    return not isinstance(fasa, dict) or fasa["budget"] >= length + NEW_TOKENS


@pytest.fixture(scope="module")
def dense(random_model: Path) -> list[dict[str, Any]]:
    with running_engine(random_model, None, **COMMON) as engine:
        return generate(
            engine, prompts(), [None] * 8, NEW_TOKENS, return_logprob=True, ignore_eos=True
        )


# Engine arguments by what they test. ``fasa serve`` leaves prefill graphs to SGLang, which has them
# by default; ``running_engine`` does not.
ENGINES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "default-prefill-graphs": {"cuda_graph_backend_prefill": None},
    "eager": EAGER,
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: pytest.FixtureRequest,
    dense: list[dict[str, Any]],
    random_model: Path,
    random_calibration: str,
) -> Iterator[Any]:
    """Started after ``dense`` has ended: a process runs one engine at a time."""
    settings = {"calibration": random_calibration, "min_seq_len": 0, "max_budget": 8192}
    with running_engine(random_model, settings, **COMMON, **ENGINES[request.param]) as running:
        yield running


def test_batches_of_alternating_kinds_equal_dense_where_they_attend_to_all(
    engine: Any, dense: list[dict[str, Any]]
) -> None:
    """Every kind follows every other, so a graph that reads another kind's plan would show."""
    order = [*BATCHES, *reversed(BATCHES), "mixed", "dense", "sparse", "dense"]
    agreement = Agreement()
    for kind in order:
        batch = BATCHES[kind]
        replies = generate(engine, prompts(), batch, NEW_TOKENS, ignore_eos=True)
        for i, (fasa, reply) in enumerate(zip(batch, replies, strict=True)):
            report = reply["meta_info"]["fasa"]
            assert report["sparse_steps"] == (NEW_TOKENS - 1 if fasa else 0)
            if fasa is not True and attends_to_all(fasa, LENGTHS[i]):
                agreement.compare(dense[i], reply, f"{kind}, fasa={fasa}")
    agreement.require(MIN_AGREEMENT)


def test_small_budgets_read_few_tokens_and_do_not_agree_with_dense(
    engine: Any, dense: list[dict[str, Any]]
) -> None:
    """A backend that attends to the wrong tokens would not reach ``MIN_AGREEMENT``."""
    replies = generate(engine, prompts(), [{"budget": 64}] * 8, NEW_TOKENS, ignore_eos=True)
    agreement = Agreement()
    for i, reply in enumerate(replies):
        ratio = reply["meta_info"]["fasa"]["kv_read_ratio"]
        assert (ratio < 0.5) == (LENGTHS[i] > 200), (LENGTHS[i], ratio)
        if LENGTHS[i] > 200:
            agreement.compare(dense[i], reply)
    print(f"small budgets: {agreement.share:.1%} of steps agree with dense")
    assert agreement.problems and agreement.share < MIN_AGREEMENT


def test_batches_smaller_than_a_captured_one_are_padded(
    engine: Any, dense: list[dict[str, Any]]
) -> None:
    agreement = Agreement()
    for count in (3, 5, 7):
        batch = [COVERED, None, {**COVERED, "prefix": "full"}, *[COVERED] * 4][:count]
        replies = generate(engine, prompts()[:count], batch, NEW_TOKENS, ignore_eos=True)
        for expected, reply in zip(dense, replies, strict=False):
            agreement.compare(expected, reply, f"batch of {count}")
    agreement.require(MIN_AGREEMENT)


def test_labels_follow_slots_through_the_prefix_cache(engine: Any) -> None:
    """Sparse follow-ups agree whichever request filled the prefix and wherever its slots lie.

    They do not agree to the last token: ties at the edge of the budget are broken in no order, a
    prefill of another length rounds keys differently, and the random model turns either into other
    tokens after some steps. Replies that select recent tokens only show how soon wrong labels would
    tell.
    """
    shared, others = prompts()[4], prompts()[5]
    parameters: list[Any] = [
        {"budget": 128},
        {"budget": 256, "prefix": "full"},
        {"budget": 512},
    ] * 2
    tails = [[11, 12, 13], [21] * 40, [31, 32], [41], [51, 52], [61] * 9]

    def fill(*requests: tuple[list[int], Any]) -> None:
        flush_cache(engine)
        for prompt, fasa in requests:
            generate(engine, [prompt], [fasa], 4, ignore_eos=True)

    def follow_up(cached: bool, **more: Any) -> list[list[int]]:
        answers = []
        for tail, fasa in zip(tails, parameters, strict=True):
            if not cached:
                flush_cache(engine)
            [reply] = generate(engine, [shared + tail], [{**fasa, **more}], 24, ignore_eos=True)
            assert reply["meta_info"]["cached_tokens"] == (len(shared) if cached else 0)
            answers.append(reply["output_ids"])
        return answers

    cold = follow_up(cached=False)
    fill((shared, None))
    runs = {"filled by a dense request": follow_up(cached=True)}
    fill((others, {"budget": 256}), (shared, {"budget": 128}))
    runs["filled after other prompts"] = follow_up(cached=True)
    fill((shared, None))
    few = {"budget": 101, "recent": 100, "sink": 0, "prefix": "select"}
    runs["recent tokens"] = follow_up(cached=True, **few)
    steps = {name: sum(map(agreeing_steps, cold, run)) for name, run in runs.items()}
    print(f"steps of {24 * len(cold)} that agree with a cold run: {steps}")
    recent = steps.pop("recent tokens")
    assert min(steps.values()) > 3 * recent


def test_comparison_selectors_share_a_batch_and_each_has_its_own_effect(
    dense: list[dict[str, Any]], random_model: Path, random_calibration: str
) -> None:
    """Every selector beside every other, dense and FASA, with and without the whole prompt.

    With covering budgets all of them equal dense; with small ones no two replies are equal.
    """
    settings = {"calibration": random_calibration, "min_seq_len": 0, "max_budget": 8192}
    settings["selector"] = "any"
    names = [name for name in SELECTORS if name != "fasa"]
    covering: list[Any] = [{**COVERED, "selector": name} for name in names]
    covering[-1]["prefix"] = "full"
    covering += [None, COVERED]
    # The same long prompt in every lane, and each lane's own prompt.
    same = [prompts()[4]] * (len(names) + 1)
    small: list[Any] = [{"budget": 64, "selector": name} for name in SELECTORS]
    lanes = [i % len(LENGTHS) for i in range(len(covering))]
    with running_engine(random_model, settings, **COMMON) as engine:
        batch = [prompts()[i] for i in lanes]
        replies = generate(engine, batch, covering, NEW_TOKENS, ignore_eos=True)
        sparse = generate(engine, same, small, NEW_TOKENS, ignore_eos=True)
    agreement = Agreement()
    for i, fasa, reply in zip(lanes, covering, replies, strict=True):
        agreement.compare(dense[i], reply, f"fasa={fasa}")
    agreement.require(MIN_AGREEMENT)
    assert all(reply["meta_info"]["fasa"]["kv_read_ratio"] < 0.5 for reply in sparse)
    answers = {name: reply["output_ids"] for name, reply in zip(SELECTORS, sparse, strict=True)}
    answers["dense"] = dense[4]["output_ids"]
    assert len({tuple(ids) for ids in answers.values()}) == len(answers), answers


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["fa3", "triton"])
def test_keys_get_labels_whichever_backend_prefills(
    random_model: Path, random_calibration: str, prefill: str
) -> None:
    """Covering budgets equal SGLang with the same two backends, and small ones select as ever."""
    settings = {"calibration": random_calibration, "min_seq_len": 0, "max_budget": 8192}
    split = {**COMMON, "prefill_attention_backend": prefill}
    small = [{"budget": 128}] * 8
    recent = [{"budget": 101, "recent": 100, "sink": 0}] * 8

    def reply(engine: Any, batch: list[Any]) -> list[dict[str, Any]]:
        flush_cache(engine)
        return generate(engine, prompts(), batch, NEW_TOKENS, return_logprob=True, ignore_eos=True)

    with running_engine(random_model, None, **split) as engine:
        dense = reply(engine, [None] * 8)
    with running_engine(random_model, settings, **COMMON) as engine:
        own = reply(engine, small)
    with running_engine(random_model, settings, **split) as engine:
        replies = [reply(engine, batch) for batch in ([COVERED] * 8, small, recent)]
    agreement = Agreement()
    for expected, got in zip(dense, replies[0], strict=True):
        assert got["meta_info"]["fasa"]["sparse_steps"] == NEW_TOKENS - 1
        agreement.compare(expected, got, "covered")
    agreement.require(MIN_AGREEMENT)
    steps = [
        sum(
            agreeing_steps(expected["output_ids"], got["output_ids"])
            for expected, got, length in zip(own, others, LENGTHS, strict=True)
            if length > 200
        )
        for others in replies[1:]
    ]
    print(f"steps that agree with FASA's own prefill: {steps[0]}, of recent tokens: {steps[1]}")
    assert steps[0] > 3 * steps[1]


@pytest.mark.slow
def test_real_weights_with_covering_budgets_equal_dense(
    smollm2_path: Path, tmp_path: Path, draw: Callable[[Any, Any], Any]
) -> None:
    """Every token up to a step at which dense's own lead is within bfloat16's rounding.

    Most steps have to agree, nearly as many as those of dense runs with two attention kernels.
    """
    from transformers import AutoTokenizer

    from fasa_sglang.calibration import corpus
    from fasa_sglang.workloads.models.pretrained import load_config
    from fasa_sglang.workloads.models.random_weights import any_chunks, config_shape

    count, longest = draw(8, 64), 8000
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    ids = tokenizer(corpus.default_text().content[:400_000]).input_ids
    ratio = (longest / 10) ** (1 / (count - 1))
    texts = [ids[500 * i : 500 * i + round(10 * ratio**i)] for i in range(count)]
    calibration = tmp_path / "smollm2.safetensors"
    any_chunks(config_shape(load_config(str(smollm2_path))), 16).save(calibration)
    settings = {"calibration": str(calibration), "min_seq_len": 0, "max_budget": 8192}
    common = {"mem_fraction_static": 0.5, "cuda_graph_max_bs_decode": 16}
    common |= {"max_running_requests": 16}
    with running_engine(smollm2_path, None, **common) as engine:
        dense = generate(engine, texts, [None] * count, 64, return_logprob=True, ignore_eos=True)
    with running_engine(smollm2_path, None, baseline="triton", **common) as engine:
        triton = generate(engine, texts, [None] * count, 64, ignore_eos=True)
    with running_engine(smollm2_path, settings, **common) as engine:
        sparse = generate(engine, texts, [COVERED] * count, 64, ignore_eos=True)
    problems = []
    sparse_steps = triton_steps = 0
    for expected, got, other in zip(dense, sparse, triton, strict=True):
        assert got["meta_info"]["fasa"]["sparse_steps"] == 63
        leads = [*margins(expected), float("inf")]
        ids = expected["output_ids"]
        step, step_of_triton = (agreeing_steps(ids, reply["output_ids"]) for reply in (got, other))
        tokens = expected["meta_info"]["prompt_tokens"]
        print(
            f"{tokens} tokens: differs at step {step} with lead {leads[step]:.3f}, Triton's at "
            f"{step_of_triton} with {leads[step_of_triton]:.3f}"
        )
        if step < 64 and leads[step] > 2 * ROUNDING + 1e-3:  # log-probabilities are rounded, too
            problems.append(f"{tokens} tokens differ at step {step}, lead {leads[step]:.3f}")
        sparse_steps, triton_steps = sparse_steps + step, triton_steps + step_of_triton
    print(f"of {64 * count} steps {sparse_steps} agree, {triton_steps} with Triton's kernels")
    assert not problems, "\n".join(problems)
    assert sparse_steps > 0.8 * triton_steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({}, {"kv_cache_dtype": "fp8_e4m3"}, "FASA needs keys in the model's dtype"),
        (
            {"selector": "oracle"},
            {},
            "selector 'oracle' ranks tokens in torch",
        ),
        ({}, {"cuda_graph_backend_decode": "breakable"}, "FASA captures whole decode steps"),
    ],
    ids=["fp8-keys", "oracle-under-graphs", "breakable-graphs"],
)
def test_unsupported_settings_end_the_start_with_one_sentence(
    random_model: Path,
    random_calibration: str,
    settings: dict[str, Any],
    flags: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    """SGLang's scheduler prints the sentence and takes the process down with it."""
    import json
    import subprocess
    import sys

    script = tmp_path / "start.py"
    script.write_text(
        "import json, sys\n"
        "if __name__ == '__main__':\n"
        "    from fasa_sglang.workloads.serving.engine import running_engine\n"
        "    model, settings, flags = json.loads(sys.argv[1])\n"
        "    with running_engine(model, settings, **flags): pass\n"
    )
    flags = {**COMMON, **{"cuda_graph_backend_decode": "full"}, **flags}
    settings = {"calibration": random_calibration, **settings}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([str(random_model), settings, flags])],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr, done.stderr[-2000:]
