"""``/metrics`` equals the sum of the reports in the replies."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving import cores_of_two_ranks, running_server, server_command

PREFIX = "sglang_fasa_"
NUM_LAYERS = 2
_BY_NUMBER = object()
SWITCHES: list[Any] = [None, False, True, {"budget": 64}, {"budget": 40, "prefix": "full"}]


def scrape(server: str) -> dict[str, float]:
    """FASA's samples by name and labels, summed over SGLang's processes."""
    text = httpx.get(f"{server}/metrics", timeout=60).text
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                labels = {k: v for k, v in sample.labels.items() if k != "pid"}
                assert labels.pop("model_name") == "tiny"
                key = sample.name.removeprefix(PREFIX) + "".join(
                    f" {name}={value}" for name, value in sorted(labels.items())
                )
                samples[key] = samples.get(key, 0.0) + sample.value
    return samples


def send(server: str, i: int, fasa: Any = _BY_NUMBER, tokens: int | None = None) -> dict[str, Any]:
    """Send the i-th request of a mix and return its reply's ``meta_info``."""
    switch = SWITCHES[i % len(SWITCHES)] if fasa is _BY_NUMBER else fasa
    params: dict[str, Any] = {"max_new_tokens": tokens or 1 + i % 7, "ignore_eos": True}
    params["custom_params"] = {"fasa": switch}
    body = {"text": f"x{i} = 1\n" * (1 + i), "sampling_params": params}
    reply = httpx.post(f"{server}/generate", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.json()["meta_info"]


def require_counters_equal_replies(server: str) -> None:
    before = scrape(server)
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda i: send(server, i), range(40)))
    for _ in range(3):
        refused = {"text": "x", "sampling_params": {"custom_params": {"fasa": "yes"}}}
        assert httpx.post(f"{server}/generate", json=refused, timeout=60).status_code == 400
    after = scrape(server)

    def increase(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    reports = [reply["fasa"] for reply in replies]
    sparse = [report for report in reports if report["sparse_steps"]]
    for mode in ("sparse", "dense"):
        steps = sum(report[f"{mode}_steps"] for report in reports)
        assert steps > 0
        assert increase(f"decode_steps_total mode={mode}") == steps
    assert increase("requests_total mode=sparse") == len(sparse)
    assert increase("requests_total mode=dense") == len(reports) - len(sparse)
    read = saved = 0.0
    for reply in replies:
        # The prompt and the first new token precede the first decode step.
        start, steps = reply["prompt_tokens"] + 1, reply["completion_tokens"] - 1
        rows = NUM_LAYERS * sum(range(start, start + steps))
        read += reply["fasa"]["kv_read_ratio"] * rows
        saved += (1 - reply["fasa"]["kv_read_ratio"]) * rows
    assert increase("kv_rows_read_total") == pytest.approx(read, abs=1)
    assert increase("kv_rows_saved_total") == pytest.approx(saved, abs=1)
    assert saved > 0
    assert increase("kv_read_ratio_count") == len(sparse)
    assert increase("kv_read_ratio_sum") == pytest.approx(
        sum(report["kv_read_ratio"] for report in sparse), abs=1e-3
    )
    assert increase("refused_requests_total") == 3


def test_counters_equal_sum_of_replies(server: str) -> None:
    require_counters_equal_replies(server)
    # 6001 slots, the one layer that selects, two KV heads, eight chunks of two dims of one byte.
    assert scrape(server)["label_cache_bytes"] == 6001 * (NUM_LAYERS - 1) * 2 * 16


@pytest.mark.thorough
def test_counters_with_pipeline_stages_count_each_step_once(
    tiny_path: Path,
    tiny_calibration: str,
    tmp_path: Path,
) -> None:
    """Each of the two stages runs all requests, with one of the two layers."""
    settings = {"calibration": tiny_calibration, "min_seq_len": 0, "budget": 128}
    flags = ("--pp-size", "2", "--served-model-name", "tiny", "--enable-metrics")
    command = server_command(tiny_path, settings, *flags)
    threads = cores_of_two_ranks("--pp-size")
    log = tmp_path / "log"
    with running_server(command, log, SGLANG_CPU_OMP_THREADS_BIND=threads) as url:
        require_counters_equal_replies(url)


def test_pruned_tokens_are_counted_and_live_gauge_returns_to_zero(server: str) -> None:
    before = scrape(server).get("pruned_tokens_total", 0.0)
    prune = {"prune": "generated", "prune_budget": 330}
    with ThreadPoolExecutor(3) as pool:
        reports = pool.map(lambda i: send(server, i, fasa=prune, tokens=700)["fasa"], range(3))
        pruned = [report["pruned_tokens"] for report in reports]
    after = scrape(server)
    assert min(pruned) > 128
    assert after["pruned_tokens_total"] - before == sum(pruned)
    assert after["live_generated_tokens"] == 0


def test_dashboard_queries_only_exported_metrics(server: str) -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "scripts" / "grafana.json").read_text())
    send(server, 3)
    names = {key.split(" ")[0] for key in scrape(server)}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queried = {name for query in queries for name in re.findall(rf"{PREFIX}(\w+)", query)}
    assert len(queried) >= 6
    assert queried <= names
