"""``fasa bench agent``: a tool-using agent loop over the OpenAI API, dense and with FASA.

Many branches share a long system prompt with the descriptions of their tools. In every turn a
branch is told to look something up, calls the tool in plain text, gets the tool's output appended
and answers from it; its history grows. The tools are deterministic and know the right answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasa_sglang import __version__
from fasa_sglang.calibration import corpus
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.models.packaged import MODEL_HELP, find_model
from fasa_sglang.workloads.models.shapes import load_tokenizer
from fasa_sglang.workloads.serving.server import flush_prefix_cache, running_server, server_url
from fasa_sglang.workloads.serving.transcript import Transcript

# English prose and code take no more characters a token than that.
CHARS_PER_TOKEN = 5
COLOURS = ["amber", "azure", "black", "coral", "green", "ivory", "khaki", "lilac", "olive", "white"]
THINGS = [
    "anchor",
    "basket",
    "cabinet",
    "door",
    "engine",
    "folder",
    "garage",
    "locker",
    "safe",
    "vault",
]
RULES = """You are an agent with one tool. To look up a code, write exactly one line:
lookup("name")
The result is then given to you. Answer questions about results with the code only.

Example:
User: Look up the code of the red drawer.
Assistant: lookup("red drawer")
User: Result: the code of the red drawer is 1234. What is the code of the red drawer?
Assistant: 1234
"""


@dataclass
class Answer:
    """One request of one branch. Times in seconds.

    SGLang's HTTP process also tokenises, so that with long prompts tokens arrive in bursts: a reply
    may be as short as its first token is late. ``reply_s`` is then the time to look at; or prompts
    are sent as tokens.
    """

    branch: int
    turn: int
    kind: str
    text: str
    right: bool
    ttft_s: float
    tpot_s: float | None
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    kv_read_ratio: float | None

    @property
    def reply_s(self) -> float:
        """From the request to its last token."""
        return self.ttft_s + (self.tpot_s or 0.0) * (self.completion_tokens - 1)


class Tools:
    """The environment: a table of codes that the model cannot know.

    Args:
        seed: Equal seeds give equal tables.
    """

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.codes = {f"{a} {b}": str(draw.randrange(1000, 10000)) for a in COLOURS for b in THINGS}

    def call(self, text: str) -> tuple[str | None, str]:
        """Run the first call in a reply.

        Returns:
            The name that was looked up, None if there was no such call; and what the tool says.
        """
        found = re.search(r"lookup\(\s*[\"']([^\"']+)[\"']\s*\)", text)
        if found is None:
            return None, 'Error: expected one line, lookup("name").'
        name = found[1].strip().lower().removeprefix("the ")
        if name not in self.codes:
            return name, f"Error: there is nothing named {name}."
        return name, f"Result: the code of the {name} is {self.codes[name]}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--base-url", metavar="URL", help="of a server that runs, with FASA")
    parser.add_argument("--model", default="smollm2", help=MODEL_HELP)
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--prefix-tokens", type=int, default=4096, help="of the system prompt, at least"
    )
    parser.add_argument(
        "--tokenize",
        choices=("server", "client"),
        default="server",
        help="who tokenises; client: replies do not wait for prompts that the server tokenises",
    )
    parser.add_argument(
        "--fasa", type=json.loads, default=True, metavar="JSON", help="request keys"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write every answer as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        FasaError: There is no server, or it does not run FASA.
    """
    console = Console(width=120)
    modes = {"dense": False, "FASA": args.fasa}
    tokenizer = load_tokenizer(find_model(args.model)) if args.tokenize == "client" else None
    with _server(args) as url:
        settings = {"prefix_tokens": args.prefix_tokens, "tokenizer": tokenizer}
        # A server's first requests compile kernels.
        for fasa in modes.values():
            warm_up = drive(url, branches=1, turns=1, seed=args.seed + 1, fasa=fasa, **settings)
            asyncio.run(warm_up)
        results = {}
        for name, fasa in modes.items():
            flush_prefix_cache(url)
            size = {"branches": args.branches, "turns": args.turns}
            start = time.perf_counter()
            answers = asyncio.run(drive(url, seed=args.seed, fasa=fasa, **size, **settings))
            results[name] = summary(answers, time.perf_counter() - start)
            results[name]["answers"] = [asdict(answer) for answer in answers]
    if results["FASA"]["kv_read_ratio"] is None:
        raise FasaError(f"{url} does not report FASA; start it with: fasa serve MODEL")
    console.print(_table(args, results))
    if args.json:
        report = {"fasa_sglang": __version__, "settings": _settings(args), "runs": results}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


async def drive(
    url: str,
    *,
    branches: int,
    turns: int,
    prefix_tokens: int,
    seed: int,
    fasa: Any,
    tokenizer: Any | None = None,
) -> list[Answer]:
    """Run all branches at once; returns their answers in order.

    Args:
        url: The server's address.
        branches: Conversations over the shared prefix.
        turns: Questions of each.
        prefix_tokens: So long is the shared prefix, or somewhat longer.
        seed: Of the questions and the tools' answers.
        fasa: What every request carries as ``fasa``.
        tokenizer: Of the served model, if prompts are to be sent as tokens.

    Raises:
        FasaError: The server refused a request.
    """
    import openai

    tools = Tools(seed)
    manual = corpus.default_text().content[: prefix_tokens * CHARS_PER_TOKEN]
    start = Transcript(tokenizer, f"{manual}\n\n{RULES}")
    start.tokens(reply=False)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600) as client:
        model = (await client.models.list()).data[0].id

        async def branch(number: int) -> list[Answer]:
            draw = random.Random(f"{seed}-{number}")
            names = draw.sample(sorted(tools.codes), turns)
            said = start.copy()
            answers = []
            for turn, name in enumerate(names):
                said.add("user", f"Look up the code of the {name}.")
                call = await _ask(client, model, said, fasa)
                called, output = tools.call(call["text"])
                answers.append(Answer(number, turn, "call", right=called == name, **call))
                said.add("assistant", call["text"])
                said.add("user", f"{output} What is the code of the {name}?")
                answer = await _ask(client, model, said, fasa)
                right = re.findall(r"\d{4}", answer["text"])[:1] == [tools.codes[name]]
                answers.append(Answer(number, turn, "answer", right=right, **answer))
                said.add("assistant", answer["text"])
            return answers

        try:
            finished = await asyncio.gather(*(branch(number) for number in range(branches)))
        except openai.APIError as error:
            raise FasaError(f"the server at {url} refused a request: {error}") from error
    return [answer for answers in finished for answer in answers]


def summary(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """What the table shows of a run; None where the server did not say."""
    ratios = [answer.kv_read_ratio for answer in answers if answer.kv_read_ratio is not None]
    cached = [answer.cached_tokens for answer in answers if answer.cached_tokens is not None]
    tpots = [answer.tpot_s for answer in answers if answer.tpot_s is not None]
    turns = len({(answer.branch, answer.turn) for answer in answers})
    prompts = sum(answer.prompt_tokens for answer in answers)

    def right(kind: str) -> float:
        return statistics.mean(answer.right for answer in answers if answer.kind == kind)

    return {
        "turns_per_s": turns / seconds,
        "ttft_ms": statistics.median(answer.ttft_s for answer in answers) * 1e3,
        "tpot_ms": statistics.median(tpots) * 1e3 if tpots else None,
        "reply_ms": statistics.median(answer.reply_s for answer in answers) * 1e3,
        "cache_hit": sum(cached) / prompts if cached else None,
        "prompt_tokens": max(answer.prompt_tokens for answer in answers),
        "calls_right": right("call"),
        "answers_right": right("answer"),
        "kv_read_ratio": statistics.mean(ratios) if ratios else None,
    }


async def _ask(client: Any, model: str, said: Transcript, fasa: Any) -> dict[str, Any]:
    """One streamed completion with its times."""
    tokens = said.tokens()
    extra = {"fasa": fasa} if tokens is None else {"fasa": fasa, "input_ids": tokens}
    start = time.perf_counter()
    stream = await client.chat.completions.create(
        model=model,
        messages=said.messages if tokens is None else said.messages[-1:],
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    text, first, last, usage, report = "", None, start, None, None
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            last = time.perf_counter()
            first = last if first is None else first
            text += chunk.choices[0].delta.content
        if chunk.usage is not None:
            usage = chunk.usage
            metadata = (chunk.model_extra or {}).get("metadata") or {}
            report = next(iter(metadata.get("fasa", [])), None)
    assert usage is not None
    written = usage.completion_tokens
    details = usage.prompt_tokens_details
    return {
        "text": text.strip(),
        "ttft_s": (last if first is None else first) - start,
        "tpot_s": (last - first) / (written - 1) if first is not None and written > 1 else None,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": None if details is None else details.cached_tokens,
        "completion_tokens": written,
        "kv_read_ratio": None if report is None else report["kv_read_ratio"],
    }


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """The address of the server given, or of one that runs for the time of the block."""
    if args.base_url:
        yield server_url(args.base_url)
        return
    settings = json.dumps({"min_seq_len": min(2048, args.prefix_tokens)})
    flags = ("--enable-cache-report", "--settings", settings)
    with running_server(find_model(args.model), *flags) as url:
        yield url


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("branches", "turns", "prefix_tokens", "fasa", "seed", "tokenize")
    return {name: getattr(args, name) for name in names}


def _table(args: argparse.Namespace, results: dict[str, Any]) -> Table:
    table = Table(
        title=f"{args.branches} branches of {args.turns} turns, prompts of up to "
        f"{results['dense']['prompt_tokens']} tokens"
    )
    columns = ("run", "turns/s", "TTFT ms", "TPOT ms", "reply ms", "cache hit")
    for column in (*columns, "calls right", "answers right", "KV read"):
        table.add_column(column, justify="right")

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for name, row in results.items():
        table.add_row(
            name,
            shown(row["turns_per_s"], ".2f"),
            shown(row["ttft_ms"], ".0f"),
            shown(row["tpot_ms"], ".2f"),
            shown(row["reply_ms"], ".0f"),
            shown(row["cache_hit"], ".1%"),
            shown(row["calls_right"], ".0%"),
            shown(row["answers_right"], ".0%"),
            shown(row["kv_read_ratio"], ".3f"),
        )
    return table
