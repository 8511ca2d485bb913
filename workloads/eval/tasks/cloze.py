"""Words that a long reply comes back to: would the model say them again?

As LAMBADA does (Paperno et al. 2016), it asks for whole words that what was said before makes
likely, and as Zoology's slices of text do (Arora et al. 2023), for those that can be recalled. The
reply is a text, forced, so that all settings say the same; its keys are written by decode steps.
"""

from __future__ import annotations

import re
from typing import Any

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.tasks.base import Options, OwnTask, Sample, Session, text_pieces
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import forced_request, steps

# Words of prose and names of code; shorter ones grammar mostly tells.
WORD = re.compile(r"\b[^\W\d]\w{3,}\b")
# Tokens since the last mention, more than which a metric counts.
GAPS = (64, 128, 256)
REPLY_SHARE = 0.9


class Cloze(OwnTask):
    """Metrics: the share of the asked words of which the model would have said every token.

    Asked is each word of the reply that the reply said before and the prompt did not; ``over_128``
    counts those that it last said more than 128 tokens ago. The reply is the end of a piece of the
    text, what precedes it the prompt.
    """

    metrics = tuple(f"over_{gap}" for gap in GAPS)

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """A piece of the text each; the data: what is forced, and where in it asked words are."""
        reply_len = options.max_tokens or round(options.length * REPLY_SHARE)
        if not GAPS[0] < reply_len < options.length:
            raise FasaError(
                f"--max-tokens must be from {GAPS[0] + 1} to --length - 1 = {options.length - 1} "
                f"for cloze, got {reply_len}"
            )
        made = []
        for name, piece in text_pieces(tokenizer, options):
            # Once more, for where its tokens begin: at its ends it may be cut another way.
            text = tokenizer.decode(piece)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded.input_ids
            # That may leave a token less, and a request needs a prompt.
            prompt_len = max(1, len(ids) - reply_len)
            asked = returned_to(whole_words(text, encoded.offset_mapping), prompt_len)
            if asked:
                info = {"length": options.length, "asked": len(asked)}
                data = (ids[prompt_len:], asked)
                made.append(Sample(name, ids[:prompt_len], reply_len, info, data))
        if not made:
            raise FasaError(
                f"no reply of {reply_len} tokens comes back to a word of the text "
                f"{options.text.name}; give a larger --length, or another --text"
            )
        return made

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Force the reply and count the words."""
        forced, asked = sample.data
        body = forced_request(forced, {"fasa": session.fasa(setting)}, top_tokens=1)
        reply = await client.generate({"input_ids": sample.prompt, **body})
        said = [step.lead >= 0 for step in steps(reply, forced)]
        metrics = {}
        for name, least in zip(self.metrics, GAPS, strict=True):
            right = [all(said[start:end]) for start, end, gap in asked if gap > least]
            if right:
                metrics[name] = sum(right) / len(right)
        return metrics, reply


def whole_words(text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int, str]]:
    """The words of a text that share no token with what stands around them but a space.

    Args:
        text: What was tokenised.
        offsets: Where in it each token begins and ends.

    Returns:
        First token, the token after the last, and the word in lower case.
    """
    starts, ends = {}, {}
    for i, (start, end) in enumerate(offsets):
        starts[end - len(text[start:end].lstrip())] = i
        ends[end] = i + 1
    found = [(match.start(), match.end(), match.group().lower()) for match in WORD.finditer(text)]
    return [
        (starts[start], ends[end], word)
        for start, end, word in found
        if start in starts and end in ends
    ]


def returned_to(words: list[tuple[int, int, str]], prompt_len: int) -> list[tuple[int, int, int]]:
    """The words to ask for.

    Args:
        words: Of prompt and reply, as ``whole_words`` gives them.
        prompt_len: Tokens of the prompt.

    Returns:
        Of each the first token and the one after the last, counted from the reply's first, and how
        many tokens ago it was last said: more than the least of ``GAPS``.
    """
    prompt = {word for start, _, word in words if start < prompt_len}
    last: dict[str, int] = {}
    asked = []
    for start, end, word in words:
        if start >= prompt_len and word not in prompt:
            gap = start - last.get(word, start)
            if gap > GAPS[0]:
                asked.append((start - prompt_len, end - prompt_len, gap))
            last[word] = start
    return asked
