"""Words that recur in a long reply: would the model generate them again?

Like LAMBADA (Paperno et al. 2016), the task asks for whole words that the earlier text makes
likely, and like Zoology's slices of text (Arora et al. 2023), for words that can be recalled. The
reply is a forced text, so that it is the same in all settings and its keys are written by decode
steps.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.eval.sample_task import Sample, SampleTask
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.task import Options, Session
from fasa_sglang.workloads.eval.text_prompts import text_pieces
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import forced_request, steps

# Words of prose and names in code. Shorter words mostly follow from grammar.
WORD = re.compile(r"\b[^\W\d]\w{3,}\b")
# Each metric counts words whose last occurrence is more than this many tokens away.
GAPS = (64, 128, 256)
REPLY_SHARE = 0.9


class Cloze(SampleTask):
    """Metrics: the share of recurring words of which the model would generate every token.

    We ask for every word that occurs earlier in the reply but not in the prompt; ``over_128``
    counts those whose last occurrence is more than 128 tokens away. The reply is the end of a piece
    of the text, and the prompt is what precedes it.
    """

    name = "cloze"
    metrics: ClassVar = {
        f"over_{gap}": f"share of words recalled from more than {gap} tokens ago" for gap in GAPS
    }

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """One piece of the text each; its data: the forced tokens and the words to ask for."""
        reply_len = options.max_tokens or round(options.length * REPLY_SHARE)
        if not GAPS[0] < reply_len < options.length:
            raise FasaError(
                f"--max-tokens must be from {GAPS[0] + 1} to --length - 1 = {options.length - 1} "
                f"for cloze, got {reply_len}"
            )
        samples = []
        for name, piece in text_pieces(tokenizer, options):
            # Encode the piece again to learn its offsets; its ends may be tokenised differently.
            text = tokenizer.decode(piece)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded.input_ids
            # The new encoding may be a token shorter, but a request needs a prompt.
            prompt_len = max(1, len(ids) - reply_len)
            words = recurring_words(whole_words(text, encoded.offset_mapping), prompt_len)
            if words:
                info = {"length": options.length, "words": len(words)}
                data = (ids[prompt_len:], words)
                samples.append(Sample(name, ids[:prompt_len], reply_len, info, data))
        if not samples:
            raise FasaError(
                f"in the text {options.text.name}, no word of a reply of {reply_len} tokens "
                "recurs; give a larger --length, or another --text"
            )
        return samples

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Force the reply and count the words."""
        forced, words = sample.data
        body = forced_request(forced, {"fasa": session.fasa(setting)}, top_tokens=1)
        reply = await client.generate({"input_ids": sample.prompt, **body})
        correct = [step.lead >= 0 for step in steps(reply, forced)]
        metrics = {}
        for name, min_gap in zip(self.metrics, GAPS, strict=True):
            recalled = [all(correct[start:end]) for start, end, gap in words if gap > min_gap]
            if recalled:
                metrics[name] = sum(recalled) / len(recalled)
        return metrics, reply


def whole_words(text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int, str]]:
    """The words of a text whose tokens contain nothing else but a leading space.

    Args:
        text: The text.
        offsets: First and last-plus-one character of each token.

    Returns:
        First token, last token plus one, and the word in lower case.
    """
    starts, ends = {}, {}
    for i, (start, end) in enumerate(offsets):
        starts[end - len(text[start:end].lstrip())] = i
        ends[end] = i + 1
    words = [(match.start(), match.end(), match.group().lower()) for match in WORD.finditer(text)]
    return [
        (starts[start], ends[end], word)
        for start, end, word in words
        if start in starts and end in ends
    ]


def recurring_words(
    words: list[tuple[int, int, str]], prompt_len: int
) -> list[tuple[int, int, int]]:
    """The words to ask for.

    Args:
        words: Words of prompt and reply, as ``whole_words`` returns them.
        prompt_len: Tokens of the prompt.

    Returns:
        For each word: its first token and last token plus one, counted from the start of the
        reply, and its distance in tokens from its last occurrence, more than ``GAPS[0]``.
    """
    prompt = {word for start, _, word in words if start < prompt_len}
    last: dict[str, int] = {}
    recurring = []
    for start, end, word in words:
        if start >= prompt_len and word not in prompt:
            gap = start - last.get(word, start)
            if gap > GAPS[0]:
                recurring.append((start - prompt_len, end - prompt_len, gap))
            last[word] = start
    return recurring
