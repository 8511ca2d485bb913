"""An agent loop over the OpenAI API: many branches look up codes with a tool and answer from it.

All branches share a long system prompt with the description of the tool. In every turn a branch is
told to look something up, calls the tool in plain text, gets its output and answers from it, so its
history grows. The tool is deterministic and knows the right answers.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from dataclasses import dataclass
from typing import Any

from fasa_sglang.calibration import corpus
from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.serving.transcript import Transcript
from fasa_sglang.workloads.words import COLOURS, THINGS

# English prose and code have at most this many characters per token.
CHARS_PER_TOKEN = 5
REPLY_TOKENS = 24
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

    SGLang's HTTP process also tokenises, so with long prompts its tokens arrive in bursts: a late
    first token makes the rest of the reply look fast. Compare ``reply_s`` then, or send prompts as
    tokens.
    """

    branch: int
    turn: int
    kind: str
    text: str
    correct: bool
    ttft_s: float
    tpot_s: float | None
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    kv_read_ratio: float | None

    @property
    def reply_s(self) -> float:
        """Time from the request to its last token."""
        return self.ttft_s + (self.tpot_s or 0.0) * (self.completion_tokens - 1)


class Tools:
    """The agent's environment: a table of codes that the model cannot know.

    Args:
        seed: Equal seeds give equal tables.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.codes = {f"{a} {b}": str(rng.randrange(1000, 10000)) for a in COLOURS for b in THINGS}

    def call(self, text: str) -> tuple[str | None, str]:
        """Run the first tool call in a reply.

        Returns:
            The name that was looked up, None without a call; and the tool's output.
        """
        match = re.search(r"lookup\(\s*[\"']([^\"']+)[\"']\s*\)", text)
        if match is None:
            return None, 'Error: expected one line, lookup("name").'
        name = match[1].strip().lower().removeprefix("the ")
        if name not in self.codes:
            return name, f"Error: there is nothing named {name}."
        return name, f"Result: the code of the {name} is {self.codes[name]}."


async def run_agents(
    url: str,
    *,
    branches: int,
    turns: int,
    prefix_tokens: int,
    seed: int,
    fasa: Any,
    tokenizer: Any | None = None,
) -> list[Answer]:
    """Run all branches concurrently.

    Args:
        url: The server's address.
        branches: Conversations that share the prefix.
        turns: Questions per conversation.
        prefix_tokens: Minimum length of the shared prefix, in tokens.
        seed: Seed of the questions and of the tool's answers.
        fasa: Value of ``fasa`` in every request; None leaves it out.
        tokenizer: The served model's tokenizer, to send prompts as tokens.

    Returns:
        The answers of all branches, branch by branch and in order.

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

        async def run_branch(number: int) -> list[Answer]:
            names = random.Random(f"{seed}-{number}").sample(sorted(tools.codes), turns)
            transcript = start.copy()
            answers = []
            for turn, name in enumerate(names):
                transcript.add("user", f"Look up the code of the {name}.")
                call = await _complete(client, model, transcript, fasa)
                looked_up, output = tools.call(call["text"])
                answers.append(Answer(number, turn, "call", correct=looked_up == name, **call))
                transcript.add("assistant", call["text"])
                transcript.add("user", f"{output} What is the code of the {name}?")
                answer = await _complete(client, model, transcript, fasa)
                correct = re.findall(r"\d{4}", answer["text"])[:1] == [tools.codes[name]]
                answers.append(Answer(number, turn, "answer", correct=correct, **answer))
                transcript.add("assistant", answer["text"])
            return answers

        try:
            results = await asyncio.gather(*(run_branch(number) for number in range(branches)))
        except openai.APIError as error:
            raise FasaError(f"the server at {url} refused a request: {error}") from error
    return [answer for answers in results for answer in answers]


async def _complete(client: Any, model: str, transcript: Transcript, fasa: Any) -> dict[str, Any]:
    """One streamed completion: its text, times and usage, as fields of ``Answer``."""
    tokens = transcript.tokens()
    extra = {} if fasa is None else {"fasa": fasa}
    if tokens is not None:
        extra["input_ids"] = tokens
    start = time.perf_counter()
    stream = await client.chat.completions.create(
        model=model,
        messages=transcript.messages if tokens is None else transcript.messages[-1:],
        temperature=0,
        max_tokens=REPLY_TOKENS,
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
    count = usage.completion_tokens
    details = usage.prompt_tokens_details
    return {
        "text": text.strip(),
        "ttft_s": (last if first is None else first) - start,
        "tpot_s": (last - first) / (count - 1) if first is not None and count > 1 else None,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": None if details is None else details.cached_tokens,
        "completion_tokens": count,
        "kv_read_ratio": None if report is None else report["kv_read_ratio"],
    }
