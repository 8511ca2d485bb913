"""SGLang programs with ``fasa=``, against a server with the plugin."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import sglang as sgl
from sglang.srt.plugins.hook_registry import HookRegistry

import fasa_sglang  # noqa: F401 - extends sgl.gen
from fasa_sglang.errors import RequestError, UnsupportedHostError
from fasa_sglang.frontend import frontend_hooks, missing_frontend_hooks

PROMPT = "def add(a, b):\n" * 40


@pytest.fixture(scope="module", autouse=True)
def backend(server: str) -> None:
    sgl.set_default_backend(sgl.RuntimeEndpoint(server))


@sgl.function
def two_answers(s: Any, first: Any, second: Any) -> None:
    s += PROMPT
    s += sgl.gen("first", max_tokens=6, temperature=0, ignore_eos=True, fasa=first)
    s += "\nx = "
    s += sgl.gen("second", max_tokens=6, temperature=0, ignore_eos=True, fasa=second)


def report(state: Any, name: str) -> dict[str, Any]:
    return state.get_meta_info(name)["fasa"]


def test_gen_switches_fasa_per_call() -> None:
    state = two_answers.run(first={"budget": 64}, second=False)
    assert report(state, "first")["sparse_steps"] == 5
    assert report(state, "first")["budget"] == 64
    assert report(state, "second")["dense_steps"] == 5


def test_run_sets_fasa_for_calls_without_it() -> None:
    state = two_answers.run(first=None, second=False, fasa={"budget": 48})
    assert report(state, "first")["budget"] == 48
    assert report(state, "second")["sparse_steps"] == 0
    silent = two_answers.run(first=None, second=None)
    assert report(silent, "first")["sparse_steps"] == 0


def test_streamed_program_is_sparse() -> None:
    state = two_answers.run(first=None, second=None, fasa=True, stream=True)
    assert "".join(state.text_iter()).startswith(PROMPT)
    assert report(state, "second")["sparse_steps"] == 5


@pytest.mark.parametrize("num_threads", [1, 2])
def test_run_batch_sets_fasa_in_worker_threads(num_threads: int) -> None:
    """Worker threads do not inherit the caller's context."""
    states = two_answers.run_batch(
        [{"first": None, "second": False}, {"first": {"budget": 64}, "second": None}],
        num_threads=num_threads,
        fasa={"budget": 40},
    )
    assert report(states[0], "first")["budget"] == 40
    assert report(states[0], "second")["sparse_steps"] == 0
    assert report(states[1], "first")["budget"] == 64
    assert report(states[1], "second")["budget"] == 40


def test_fork_inherits_and_overrides_fasa() -> None:
    @sgl.function
    def branches(s: Any) -> None:
        s += PROMPT
        forks = s.fork(3)
        for i, fork in enumerate(forks):
            fork += f"# {i}\n"
            switch = False if i == 2 else None
            fork += sgl.gen("line", max_tokens=4, temperature=0, ignore_eos=True, fasa=switch)
        forks.join()
        s["reports"] = [report(fork, "line") for fork in forks]

    state = branches.run(fasa={"budget": 50})
    assert [entry["sparse_steps"] for entry in state["reports"]] == [3, 3, 0]
    assert [entry["budget"] for entry in state["reports"]] == [50, 50, None]


def test_typed_gen_sends_fasa() -> None:
    # The server has no grammar backend, so only the parameters to send are checked.
    expression = sgl.gen_int("x", fasa={"budget": 64})
    assert expression.sampling_params.to_srt_kwargs()["custom_params"] == {"fasa": {"budget": 64}}
    assert sgl.gen_string("x", fasa=True).sampling_params.clone().fasa is True
    sent = sgl.gen("x", fasa=True).sampling_params.to_openai_kwargs()
    assert sent["extra_body"] == {"custom_params": {"fasa": True}}
    assert "custom_params" not in sgl.gen("x").sampling_params.to_srt_kwargs()


@pytest.mark.parametrize("switch", ["yes", 1, [True]], ids=str)
def test_gen_and_run_refuse_other_types(switch: Any) -> None:
    with pytest.raises(RequestError, match="fasa must be true, false or an object"):
        sgl.gen("x", fasa=switch)
    with pytest.raises(RequestError, match="fasa must be true, false or an object"):
        two_answers.run(first=None, second=None, fasa=switch)
    with pytest.raises(RequestError, match="gen with choices decodes nothing"):
        sgl.gen("x", choices=["a", "b"], fasa=True)


def test_unknown_keys_are_refused_by_server() -> None:
    state = two_answers.run(first={"budjet": 1}, second=None)
    assert "fasa has no key 'budjet'" in str(state.error())


def test_program_with_argument_named_fasa_keeps_it() -> None:
    @sgl.function
    def program(s: Any, fasa: str) -> None:
        s += PROMPT + fasa
        s += sgl.gen("x", max_tokens=3, ignore_eos=True)

    state = program.run(fasa="is mine")
    assert state.text().startswith(PROMPT + "is mine")
    assert report(state, "x")["sparse_steps"] == 0


def test_gen_with_missing_frontend_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a release of SGLang that renames the function which merges the parameters."""
    assert missing_frontend_hooks() == []
    renamed = "sglang.lang.interpreter.StreamExecutor._resolve_sampling_params"
    assert renamed in {hook.target for hook in frontend_hooks()}
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {renamed})
    assert missing_frontend_hooks() == [renamed]
    with pytest.raises(UnsupportedHostError, match=rf"cannot reach the server, .* no {renamed}"):
        sgl.gen("x", fasa=True)
    with pytest.raises(UnsupportedHostError, match="cannot reach the server"):
        two_answers.run(first=None, second=None, fasa=True)
    assert sgl.gen("x") is not None


@pytest.mark.parametrize("first", ["sglang", "fasa_sglang"])
def test_import_order_does_not_matter(first: str) -> None:
    second = {"sglang": "fasa_sglang", "fasa_sglang": "sglang"}[first]
    code = f"import {first}, {second}, sglang; from sglang import gen; gen('x', fasa=True)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=120)


def test_importing_package_does_not_import_sglang() -> None:
    code = "import fasa_sglang, sys; assert 'sglang' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=60)
