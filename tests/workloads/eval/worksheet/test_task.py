"""``fasa eval worksheet``: its samples, what a row records, and the figure of look-backs."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from fasa_sglang.calibration.corpus import default_text
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval import sample_task
from fasa_sglang.workloads.eval.report import report_task
from fasa_sglang.workloads.eval.results import Results
from fasa_sglang.workloads.eval.sample_task import require_room
from fasa_sglang.workloads.eval.settings import Setting, parse_settings
from fasa_sglang.workloads.eval.task import Options, Session
from fasa_sglang.workloads.eval.tasks import find_task
from fasa_sglang.workloads.eval.worksheet.prompt import reply_text
from fasa_sglang.workloads.models.pretrained import load_tokenizer


class Server:
    """Replies right to dense requests, and drops the end of the third line of others."""

    replies: ClassVar[dict[tuple[int, ...], str]] = {}

    def __init__(self, url: str, concurrency: int) -> None:
        pass

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        lines = self.replies[tuple(body["input_ids"])].split("\n")
        if body["sampling_params"]["custom_params"]["fasa"]:
            lines[2] = lines[2].partition(" ->")[0]
        meta = {"prompt_tokens": len(body["input_ids"]), "completion_tokens": 9}
        return {"text": "\n".join(lines), "meta_info": meta}


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return load_tokenizer(str(smollm2_path))


def fasa(setting: Setting) -> Any:
    return setting.fasa(0, {}, False)


def options(**changes: Any) -> Options:
    given: dict[str, Any] = {"max_tokens": 1500, "own": {"variables": 24}}
    return Options(
        **{"limit": 2, "length": 1, "seed": 0, "text": default_text(), **given, **changes}
    )


def test_samples_record_how_hard_they_are(tokenizer: Any) -> None:
    task = find_task("worksheet")
    samples = task.samples(tokenizer, options())
    assert samples == task.samples(tokenizer, options())
    assert samples != task.samples(tokenizer, options(seed=1))
    for sample in samples:
        info = sample.info
        assert info["variables"] == 24 and info["rounds"] == 3
        assert 1000 < info["reply_tokens"] <= 1500 < sample.max_new_tokens + 500
        look_ups = sum(len(each.operands) for each in sample.data.instructions) * 3 + 4
        assert sum(info["look_ups"].values()) == look_ups
        assert info["longest"] > 200


def test_longer_look_backs_come_with_more_variables(tokenizer: Any) -> None:
    longest = []
    for variables in (12, 48, 100):
        given = options(max_tokens=6000, own={"variables": variables})
        samples = find_task("worksheet").samples(tokenizer, given)
        longest.append(min(sample.info["longest"] for sample in samples))
    assert longest[0] * 2 < longest[1] and longest[1] * 1.5 < longest[2]


def test_program_longer_than_the_context_is_refused(tokenizer: Any) -> None:
    samples = find_task("worksheet").samples(tokenizer, options())
    with pytest.raises(FasaError, match=r"sample 0 needs \d+ \+ \d+ tokens and the server holds"):
        require_room(samples, 1500)


def test_evaluate_pairs_replies_with_dense_and_draws_look_backs(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, settings = find_task("worksheet"), parse_settings("fasa", "64")
    task.prepare(tokenizer, options())
    replies = {tuple(sample.prompt): reply_text(sample.data) for sample in task.prepared}
    monkeypatch.setattr(Server, "replies", replies)
    monkeypatch.setattr(sample_task, "Client", Server)
    results = Results(tmp_path, {"task": "worksheet", "model": "m"})
    session = Session("", results, tokenizer, 9000, 4, options(), fasa, lambda: None)
    task.evaluate(settings, session)
    results.close()
    report_task(task, results, Console(file=StringIO()))
    dense, sparse = json.loads((tmp_path / "summary.json").read_text())["settings"]
    assert (dense["setting"], sparse["setting"]) == ("dense", "fasa-64")
    assert dense["solved"] == dense["lines"] == dense["look_up_256"] == 1
    assert sparse["solved"] == 1, "the answers do not depend on what is written about a line"
    assert sparse["lines"] < 0.1 and sparse["lines_difference"] < -0.9
    assert "look_up_4096" not in dense
    for name in ("solved", "lines", "look_up", "distances"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
