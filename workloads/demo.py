"""``fasa demo``: a fact hidden in a long prompt, asked for with and without FASA.

The real SGLang serves a real model; dense and FASA requests go to the same engine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.calibration import corpus
from fasa_sglang.calibration.calibrate import calibrate
from fasa_sglang.calibration.model import load_model
from fasa_sglang.calibration.progress import progress_bar
from fasa_sglang.calibration.settings import CalibrationSettings
from fasa_sglang.calibration_cache import cache_dir
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.models.packaged import MODEL_HELP, find_model
from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from fasa_sglang.workloads.serving.forced import agreement, forced_request, steps

FACT = "Remember this: the passcode of the blue vault is 48213."
QUESTION = "What is the passcode of the blue vault? Answer with one sentence."
FOLLOW_UP = "Now say only the digits of the passcode."
SECRET = "48213"
MAX_NEW_TOKENS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", default="smollm2", help=MODEL_HELP)
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="length of the prompt")
    parser.add_argument(
        "--budgets", type=_budgets, default=[512, 256], metavar="N,N", help="default: 512,256"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")


def _budgets(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> None:
    """Run the demo.

    Raises:
        FasaError: The model cannot be had or served, or an answer is not what it must be.
    """
    console, log = Console(), Console(stderr=True)
    log.print(f"model: {args.model}")
    model = find_model(args.model)
    calibration = cache_dir() / "demo.fasa.safetensors"
    calibration.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = _calibrate(model, calibration, args.prompt_tokens)
    conversation = [{"role": "user", "content": _prompt(tokenizer, args.prompt_tokens)}]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    log.print(f"starting SGLang on {device}")
    settings = {
        "calibration": str(calibration),
        "min_seq_len": min(1024, args.prompt_tokens),
        "max_budget": max(4096, *args.budgets),
    }
    with running_engine(
        model,
        settings,
        max_total_tokens=4 * args.prompt_tokens,
        chunked_prefill_size=2 * args.prompt_tokens,
        enable_custom_logit_processor=True,
    ) as engine:
        rows = _first_turn(engine, tokenizer, conversation, args.budgets, log)
        conversation.append({"role": "assistant", "content": rows[0]["answer"]})
        conversation.append({"role": "user", "content": FOLLOW_UP})
        rows += _second_turn(engine, tokenizer, conversation, args.budgets[0], log)
    console.print(_table(model, rows))
    if args.json:
        report = {
            "fasa_sglang": __version__,
            "model": model,
            "device": device,
            "question": QUESTION,
            "runs": rows,
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    _judge(rows)


def _calibrate(model: str, path: Path, prompt_tokens: int) -> Any:
    """Write the calibration file; returns the tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, tokenizer = load_model(model, device)
    context = loaded.config.get_text_config().max_position_embeddings
    if prompt_tokens + 8 * MAX_NEW_TOKENS > context:
        raise FasaError(
            f"a prompt of {prompt_tokens} tokens and its answers do not fit the model's context of "
            f"{context} tokens; pass a smaller --prompt-tokens"
        )
    with progress_bar() as progress:
        dominant = calibrate(
            loaded,
            tokenizer,
            corpus.default_text(),
            corpus.held_out_text(),
            CalibrationSettings(),
            progress=progress,
        )
    dominant.save(path)
    return tokenizer


def _prompt(tokenizer: Any, prompt_tokens: int) -> str:
    """Python's reference with the fact in its middle and the question at its end."""
    filler = corpus.default_text().content
    ids = tokenizer(filler[: 16 * prompt_tokens], add_special_tokens=False).input_ids
    middle = prompt_tokens // 2
    before = tokenizer.decode(ids[:middle])
    after = tokenizer.decode(ids[middle:prompt_tokens])
    return f"{before}\n\n{FACT}\n\n{after}\n\n{QUESTION}"


def _first_turn(
    engine: Any,
    tokenizer: Any,
    conversation: list[dict[str, str]],
    budgets: list[int],
    log: Console,
) -> list[dict[str, Any]]:
    log.print("asking densely (this prefills the prompt)")
    dense = _ask(engine, tokenizer, conversation, "dense", {"fasa": False})
    dense_ids = dense.pop("output_ids")
    rows = [{**dense, "top1_agreement": 1.0}]
    for budget in budgets:
        log.print(f"asking with FASA, budget {budget}")
        custom_params = {"fasa": {"budget": budget}}
        row = _ask(engine, tokenizer, conversation, f"FASA {budget}", custom_params)
        del row["output_ids"]
        forced = engine.generate(
            input_ids=_ids(tokenizer, conversation), **forced_request(dense_ids, custom_params)
        )
        rows.append({**row, "top1_agreement": agreement(steps(forced, dense_ids))})
    return rows


def _second_turn(
    engine: Any, tokenizer: Any, conversation: list[dict[str, str]], budget: int, log: Console
) -> list[dict[str, Any]]:
    rows = []
    for name in (f"turn 2, FASA {budget}", f"turn 2, FASA {budget}, cold"):
        if name.endswith("cold"):
            log.print("asking the second question again with the prefix cache flushed")
            flush_cache(engine)
        row = _ask(engine, tokenizer, conversation, name, {"fasa": {"budget": budget}})
        del row["output_ids"]
        rows.append({**row, "top1_agreement": None})
    return rows


def _ids(tokenizer: Any, conversation: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(turn["content"] for turn in conversation) + "\n").input_ids
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def _ask(
    engine: Any,
    tokenizer: Any,
    conversation: list[dict[str, str]],
    name: str,
    custom_params: dict[str, Any],
) -> dict[str, Any]:
    start = time.perf_counter()
    reply = engine.generate(
        input_ids=_ids(tokenizer, conversation),
        sampling_params={
            "temperature": 0,
            "max_new_tokens": MAX_NEW_TOKENS,
            "custom_params": custom_params,
        },
    )
    meta = reply["meta_info"]
    return {
        "run": name,
        "answer": reply["text"],
        "output_ids": reply["output_ids"],
        "prompt_tokens": meta["prompt_tokens"],
        "cached_tokens": meta["cached_tokens"],
        "completion_tokens": meta["completion_tokens"],
        "time_sec": round(time.perf_counter() - start, 3),
        **meta["fasa"],
    }


def _table(model: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{Path(model).name}: {QUESTION}")
    table.add_column("run")
    table.add_column("answer")
    for heading in ("KV read", "cached prefix", "top-1 as dense", "time"):
        table.add_column(heading, justify="right")
    for row in rows:
        same = row["top1_agreement"]
        table.add_row(
            row["run"],
            row["answer"].strip(),
            f"{row['kv_read_ratio']:.3f}",
            f"{row['cached_tokens']} of {row['prompt_tokens']}",
            "" if same is None else f"{same:.0%}",
            f"{row['time_sec']:.1f} s",
        )
    return table


def _judge(rows: list[dict[str, Any]]) -> None:
    """The demo is done only if it showed what it is for.

    Raises:
        FasaError: A sparse run read everything, or the second turn depends on the prefix cache.
    """
    warm, cold = rows[-2:]
    if not all(row["sparse_steps"] for row in rows[1:]):
        raise FasaError("a FASA run had no sparse step; expected one per generated token")
    if not warm["cached_tokens"]:
        raise FasaError(
            "the second turn found nothing in the prefix cache; expected the first turn"
        )
    if cold["cached_tokens"]:
        raise FasaError(
            f"the cold run found {cold['cached_tokens']} tokens in the prefix cache; expected none"
        )
    if warm["answer"] != cold["answer"]:
        raise FasaError(
            f"the second turn answered {warm['answer']!r} from the prefix cache and "
            f"{cold['answer']!r} without it; expected the same"
        )
