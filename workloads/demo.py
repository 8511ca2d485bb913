"""``fasa demo``: ask for a fact in a long prompt, with and without FASA.

A real model runs in the real SGLang; dense and FASA requests go to the same engine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.calibration import corpus
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.device import device_name
from fasa_sglang.workloads.models.packaged import MODEL_HELP, find_model
from fasa_sglang.workloads.models.pretrained import load_config, load_tokenizer
from fasa_sglang.workloads.serving.chat import chat_ids
from fasa_sglang.workloads.serving.engine import flush_cache, running_engine
from fasa_sglang.workloads.serving.forced import agreement, forced_request, steps

FACT = "Remember this: the passcode of the blue vault is 48213."
QUESTION = "What is the passcode of the blue vault? Answer with one sentence."
FOLLOW_UP = "Now say only the digits of the passcode."
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
        FasaError: The model is not available or cannot be served, or FASA did not work as it must.
    """
    console, log = Console(), Console(stderr=True)
    log.print(f"model: {args.model}")
    model = find_model(args.model)
    _require_context(model, args.prompt_tokens)
    tokenizer = load_tokenizer(model)
    conversation = [{"role": "user", "content": _prompt(tokenizer, args.prompt_tokens)}]
    log.print(f"starting SGLang on {device_name()}")
    settings = {
        # Makes the calibration at the first start, and keeps it for the next.
        "calibration": "auto",
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
            "device": device_name(),
            "question": QUESTION,
            "runs": rows,
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    require_sparse_and_exact(rows)


def _require_context(model: str, prompt_tokens: int) -> None:
    context = load_config(model).get_text_config().max_position_embeddings
    if prompt_tokens + 8 * MAX_NEW_TOKENS > context:
        raise FasaError(
            f"a prompt of {prompt_tokens} tokens and its answers do not fit the model's context of "
            f"{context} tokens; pass a smaller --prompt-tokens"
        )


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
    prompt = chat_ids(tokenizer, conversation)
    log.print("decoding densely (this prefills the prompt)")
    dense, dense_ids = _generate(engine, prompt, "dense", {"fasa": False})
    rows = [{**dense, "top1_agreement": 1.0}]
    for budget in budgets:
        log.print(f"decoding with FASA, budget {budget}")
        custom_params = {"fasa": {"budget": budget}}
        row, _ = _generate(engine, prompt, f"FASA {budget}", custom_params)
        forced = engine.generate(input_ids=prompt, **forced_request(dense_ids, custom_params))
        rows.append({**row, "top1_agreement": agreement(steps(forced, dense_ids))})
    return rows


def _second_turn(
    engine: Any, tokenizer: Any, conversation: list[dict[str, str]], budget: int, log: Console
) -> list[dict[str, Any]]:
    prompt = chat_ids(tokenizer, conversation)
    custom_params = {"fasa": {"budget": budget}}
    warm, _ = _generate(engine, prompt, f"turn 2, FASA {budget}", custom_params)
    log.print("repeating the second turn after flushing the prefix cache")
    flush_cache(engine)
    cold, _ = _generate(engine, prompt, f"turn 2, FASA {budget}, cold", custom_params)
    return [{**row, "top1_agreement": None} for row in (warm, cold)]


def _generate(
    engine: Any, prompt: list[int], name: str, custom_params: dict[str, Any]
) -> tuple[dict[str, Any], list[int]]:
    """Decode greedily; returns a row of the report and the reply's token ids."""
    start = time.perf_counter()
    reply = engine.generate(
        input_ids=prompt,
        sampling_params={
            "temperature": 0,
            "max_new_tokens": MAX_NEW_TOKENS,
            "custom_params": custom_params,
        },
    )
    meta = reply["meta_info"]
    row = {
        "run": name,
        "answer": reply["text"],
        "prompt_tokens": meta["prompt_tokens"],
        "cached_tokens": meta["cached_tokens"],
        "completion_tokens": meta["completion_tokens"],
        "time_sec": round(time.perf_counter() - start, 3),
        **meta["fasa"],
    }
    return row, reply["output_ids"]


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


def require_sparse_and_exact(rows: list[dict[str, Any]]) -> None:
    """Check that FASA was in effect and that the second turn does not depend on the prefix cache.

    Args:
        rows: The dense run, the FASA runs, and the second turn with and without a prefix cache.

    Raises:
        FasaError: Names what did not work.
    """
    warm, cold = rows[-2:]
    if not all(row["sparse_steps"] for row in rows[1:]):
        raise FasaError("a FASA run had no sparse step; expected one per generated token")
    if not warm["cached_tokens"]:
        raise FasaError(
            "the second turn reused nothing from the prefix cache; expected the first turn"
        )
    if cold["cached_tokens"]:
        raise FasaError(
            f"the cold run reused {cold['cached_tokens']} tokens from the prefix cache; expected "
            "none"
        )
    if warm["answer"] != cold["answer"]:
        raise FasaError(
            f"the second turn answered {warm['answer']!r} with the prefix cache and "
            f"{cold['answer']!r} without it; expected the same"
        )
