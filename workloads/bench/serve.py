"""``fasa bench serve``: the same requests to SGLang's own backend and to ``fasa``.

Both engines run in this command, one after the other, with the same settings. TTFT is the time of
a cold prompt's first token. For TPOT all prompts are in the prefix cache, so that the whole batch
decodes at once: the time of ``N`` tokens less that of one token, over ``N - 1``.

SGLang's own client (``sglang.benchmark``) can neither send ``custom_params`` nor do without a
tokenizer, so the requests are sent here; what is measured is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.dominant_fcs import ModelShape
from fasa_sglang.workloads.eval.settings import json_object
from fasa_sglang.workloads.models.packaged import packaged_model
from fasa_sglang.workloads.models.shapes import SHAPES, any_chunks, load_config, write_shape
from fasa_sglang.workloads.plots import plot_speedup
from fasa_sglang.workloads.serving.engine import flush_cache, running_engine, update_weights

DEFAULT_CASES = {
    "llama3.1-8b": "1x1024,8x1024,1x32768,32x8192,8x32768,12x32768,1x131072",
    "qwen3-8b": "1x1024,8x1024,1x32768,32x8192,8x32768",
    "smollm2": "1x1024,1x8064,8x8064",
}
# Eighths of the chunks in a label, and its type.
LABELS = {
    "quarter-fp8": (2, "fp8"),
    "three-eighths-fp8": (3, "fp8"),
    "half-fp8": (4, "fp8"),
    "quarter-bf16": (2, "bf16"),
}
REPEATS = 3
SHORT_PREFILL = 65536
SHORT_PROMPT = 2048
# Of short prompts the question is one percent.
REPEATS_OF_SHORT = 9


@dataclass
class Row:
    """One batch shape on one backend. Times in milliseconds."""

    batch_size: int
    prompt_len: int
    backend: str
    fasa: bool
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    kv_read_ratio: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    shapes = (*SHAPES, "smollm2")
    parser.add_argument("--shape", choices=shapes, default="llama3.1-8b", help="see README")
    parser.add_argument("--cases", help="BATCHxTOKENS,...; the context holds prompt and output")
    parser.add_argument("--budget", type=int, default=2048, help="tokens per (request, KV head)")
    parser.add_argument("--labels", choices=tuple(LABELS), default="half-fp8")
    parser.add_argument("--combine", choices=("mean", "nrm"), default="nrm")
    parser.add_argument(
        "--request", type=json_object, default={}, metavar="JSON", help="further request keys"
    )
    parser.add_argument("--output-tokens", type=int, default=128, help="tokens timed per request")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up against context as PNG")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: The model cannot be had or served.
    """
    console, log = Console(width=150), Console(stderr=True)
    cases = [
        (int(batch), int(tokens))
        for batch, tokens in (
            case.split("x") for case in (args.cases or DEFAULT_CASES[args.shape]).split(",")
        )
    ]
    with tempfile.TemporaryDirectory() as work:
        model, overrides = served_model(args.shape, Path(work))
        calibration = str(Path(work) / "calibration.safetensors")
        shape = ModelShape.from_config(load_config(model))
        eighths, label_dtype = LABELS[args.labels]
        any_chunks(shape, shape.rope.num_chunks * eighths // 8).save(calibration)
        settings = {
            "calibration": calibration,
            "budget": args.budget,
            "max_budget": args.budget,
            "label_dtype": label_dtype,
            "combine": args.combine,
        }
        overrides |= {
            "skip_tokenizer_init": True,
            "max_running_requests": max(batch for batch, _ in cases),
            "cuda_graph_bs_decode": sorted({batch for batch, _ in cases}),
        }
        rows = []
        for fasa in (None, settings):
            log.print(f"starting SGLang with {'its own backend' if fasa is None else 'fasa'}")
            with running_engine(model, fasa, **overrides) as engine:
                if args.shape in SHAPES:
                    spread_keys(engine, SHAPES[args.shape])
                asked = None if fasa is None else {"budget": args.budget, **args.request}
                rows += _measure(engine, cases, asked, args.output_tokens, log)
    console.print(
        f"{args.shape}, budget {args.budget}, labels {args.labels}, combine {args.combine}, "
        f"{device_name()}, sglang {version('sglang')}"
    )
    console.print(_table(rows))
    if args.json:
        report = {
            "fasa_sglang": __version__,
            "sglang": version("sglang"),
            "torch": torch.__version__,
            "device": device_name(),
            "shape": args.shape,
            "settings": {**settings, "calibration": args.labels},
            "request": args.request,
            "rows": [asdict(row) for row in rows],
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        dense = {_case(row): row for row in rows if row.backend != "fasa"}
        points = [
            (f"batch {row.batch_size}", row.prompt_len, dense[_case(row)].tpot_ms / row.tpot_ms)
            for row in sorted(rows, key=_case)
            if row.fasa
        ]
        plot_speedup(points, "time per token, times faster than SGLang's own backend", args.plot)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _case(row: Row) -> tuple[int, int]:
    return row.batch_size, row.prompt_len


def served_model(shape: str, work: Path) -> tuple[str, dict[str, Any]]:
    """A folder to serve, and what SGLang has to be told about it."""
    if shape not in SHAPES:
        return str(packaged_model(shape)), {}
    write_shape(shape, work / shape)
    return str(work / shape), {"load_format": "dummy", "mem_fraction_static": 0.9}


def spread_keys(engine: Any, shape: dict[str, Any]) -> None:
    """Give every token of the vocabulary its own hidden state, and so its own keys.

    SGLang's dummy weights are so small, those of the norms included, that attention's average
    drowns the tokens: all keys of a request become equal, and so do all scores, which no real
    model does.
    """
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(shape["vocab_size"], hidden, generator=generator).bfloat16()
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden)}
    for i in range(shape["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden)
        if shape["model_type"] == "qwen3":
            for norm in ("q_norm", "k_norm"):
                weights[f"model.layers.{i}.self_attn.{norm}.weight"] = torch.ones(head_dim)
    update_weights(engine, {name: weight.bfloat16() for name, weight in weights.items()})


def _measure(
    engine: Any, cases: list[tuple[int, int]], fasa: Any, output_tokens: int, log: Console
) -> list[Row]:
    """Rows of one engine; ``fasa`` is what requests ask for, None for SGLang's own backend."""
    rows = []
    for batch_size, context in cases:
        prompt_len = context - output_tokens
        draw = random.Random(0)
        prompts = [
            [draw.randrange(1000, 40000) for _ in range(prompt_len)] for _ in range(batch_size)
        ]
        ttft_ms = _ttft(engine, prompts, fasa or False)
        # Switched off, only the fixed costs matter, which weigh most in short steps.
        off = fasa is None or prompt_len <= SHORT_PROMPT
        for on in (False, True)[not off : 1 + (fasa is not None)]:
            tpot_ms, ratio = _tpot(engine, prompts, fasa if on else False, output_tokens)
            row = Row(
                batch_size,
                context,
                "dense" if fasa is None else "fasa",
                on,
                ttft_ms,
                tpot_ms,
                batch_size * 1e3 / tpot_ms,
                ratio,
            )
            log.print(f"  {batch_size} x {context}, fasa {on}: {tpot_ms:.2f} ms per token")
            rows.append(row)
    return rows


def _ttft(engine: Any, prompts: list[list[int]], fasa: Any) -> float:
    """Median time of the first token of all cold prompts; leaves them in the prefix cache."""
    times = []
    # Long prefills vary little and take most of the command's time.
    for _ in range(REPEATS if len(prompts) * len(prompts[0]) <= SHORT_PREFILL else 1):
        flush_cache(engine)
        times.append(_generate(engine, prompts, fasa, 1)[0])
    return statistics.median(times) * 1e3


def _tpot(
    engine: Any, prompts: list[list[int]], fasa: Any, output_tokens: int
) -> tuple[float, float | None]:
    first, whole = [], []
    for _ in range(REPEATS_OF_SHORT if len(prompts[0]) <= SHORT_PROMPT else REPEATS):
        first.append(_generate(engine, prompts, fasa, 1)[0])
        seconds, replies = _generate(engine, prompts, fasa, output_tokens)
        whole.append(seconds)
    tpot_ms = (statistics.median(whole) - statistics.median(first)) / (output_tokens - 1) * 1e3
    report = replies[0]["meta_info"].get("fasa")
    return tpot_ms, None if report is None else report["kv_read_ratio"]


def _generate(
    engine: Any, prompts: list[list[int]], fasa: Any, max_new_tokens: int
) -> tuple[float, list[dict[str, Any]]]:
    params = {
        "temperature": 0,
        "max_new_tokens": max_new_tokens,
        "ignore_eos": True,
        "custom_params": {"fasa": fasa},
    }
    start = time.perf_counter()
    replies = engine.generate(input_ids=prompts, sampling_params=params)
    return time.perf_counter() - start, replies


def _table(rows: list[Row]) -> Table:
    dense = {_case(row): row for row in rows if row.backend != "fasa"}
    table = Table(title="medians; speed-up over SGLang's own backend")
    for column in ("batch", "tokens", "backend", "TTFT ms", "TPOT ms", "tokens/s", "KV read", "x"):
        table.add_column(column, justify="right")
    for row in sorted(rows, key=_case):
        name = row.backend if row.backend != "fasa" else f"fasa {'on' if row.fasa else 'off'}"
        table.add_row(
            str(row.batch_size),
            str(row.prompt_len),
            name,
            f"{row.ttft_ms:.0f}",
            f"{row.tpot_ms:.2f}",
            f"{row.tokens_per_s:.0f}",
            "" if row.kv_read_ratio is None else f"{row.kv_read_ratio:.3f}",
            f"{dense[_case(row)].tpot_ms / row.tpot_ms:.2f}",
        )
    return table
