"""A passcode that is seen once, then a long generation, then the question.

What evicting methods lose: nothing repeats the passcode, and no query wants it until the end. The
generation is forced, so that all settings generate the same; its keys are written by decode steps.
"""

from __future__ import annotations

import random
from typing import Any

from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.tasks.base import Options, OwnTask, Sample, Session, text_ids
from fasa_sglang.workloads.eval.tasks.needle import NEEDLES, draw_codes, fact, right
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import forced_request, require_followed

ANSWER_TOKENS = 24
# Of the whole conversation; the rest is the generation.
PROMPT_SHARE = 0.5


class WriteOnce(OwnTask):
    """Metric: the asked passcode is the first number of the answer.

    In half of the samples the passcodes stand in the user's turn, in the others the model itself
    writes them down at the beginning of its long reply.
    """

    metrics = ("accuracy",)

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """The data: what is forced, and the code."""
        ids = text_ids(tokenizer, options.text, options.length + 1)
        made = []
        for i in range(options.limit):
            draw = random.Random(f"{options.seed}-{i}")
            codes = draw_codes(draw, NEEDLES)
            asked = draw.choice(sorted(codes))
            facts = " ".join(fact(name, code) for name, code in codes.items())
            where = ("prompt", "reply")[i % 2]
            prompt_len = round(options.length * PROMPT_SHARE) - 150
            reply_len = options.length - prompt_len - 300
            start = draw.randrange(len(ids) - prompt_len - reply_len)
            text = tokenizer.decode(ids[start : start + prompt_len])
            reply = tokenizer.decode(ids[start + prompt_len : start + prompt_len + reply_len])
            told = f"\n\nRemember: {facts}" if where == "prompt" else ""
            noted = f"I note this: {facts}\n\n" if where == "reply" else ""
            turns = [
                {"role": "user", "content": f"{text}{told}\n\nThink about this text at length."},
                {"role": "assistant", "content": f"{noted}{reply}"},
                {"role": "user", "content": f"What is the passcode of the {asked}?"},
            ]
            whole = _conversation(tokenizer, turns)
            begun = _conversation(tokenizer, turns[:1])
            made.append(
                Sample(
                    f"{i}",
                    whole[: len(begun)],
                    len(whole) - len(begun) + ANSWER_TOKENS,
                    {"where": where, "generated": len(whole) - len(begun)},
                    (whole[len(begun) :], codes[asked]),
                )
            )
        return made

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Force the generation and the question, and let the model answer."""
        forced, code = sample.data
        body = forced_request(
            forced, {"fasa": session.fasa(setting)}, top_tokens=1, free_tokens=ANSWER_TOKENS
        )
        reply = await client.generate({"input_ids": sample.prompt, **body})
        require_followed(reply, forced)
        answer = session.tokenizer.decode(reply["output_ids"][len(forced) :])
        return {"accuracy": right(answer, code)}, {**reply, "text": answer}


def _conversation(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(turn["content"] for turn in turns) + "\n").input_ids
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids
