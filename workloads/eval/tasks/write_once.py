"""A passcode that occurs once, then a long generation, then the question.

This is what methods that evict tokens lose: nothing repeats the passcode, and no query attends to
it until the end. The generation is forced, so that it is the same in all settings and its keys are
written by decode steps.
"""

from __future__ import annotations

import random
from typing import Any, ClassVar

from fasa_sglang.workloads.eval.passcodes import ANSWER_TOKENS, draw_codes, fact, score
from fasa_sglang.workloads.eval.sample_task import Sample, SampleTask
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.task import Options, Session
from fasa_sglang.workloads.eval.text_prompts import text_ids
from fasa_sglang.workloads.serving.chat import chat_ids
from fasa_sglang.workloads.serving.client import Client
from fasa_sglang.workloads.serving.forced import forced_request, require_followed

REQUEST = "Think about this text at length."
# Share of the conversation that is prompt; the rest is generated.
PROMPT_SHARE = 0.5


class WriteOnce(SampleTask):
    """Metric: whether the first number of the answer is the right passcode.

    In half of the samples the passcodes are in the user's turn; in the others the model writes them
    at the beginning of its long reply.
    """

    name = "write-once"
    metrics: ClassVar = {"accuracy": "share of right answers"}

    def samples(self, tokenizer: Any, options: Options) -> list[Sample]:
        """A sample's data: the forced tokens and the code."""
        ids = text_ids(tokenizer, options.text, options.length + 1)
        samples = []
        for i in range(options.limit):
            rng = random.Random(f"{options.seed}-{i}")
            codes = draw_codes(rng)
            target = rng.choice(sorted(codes))
            facts = " ".join(fact(place, code) for place, code in codes.items())
            where = ("prompt", "reply")[i % 2]
            prompt_len = round(options.length * PROMPT_SHARE) - 150
            reply_len = options.length - prompt_len - 300
            start = rng.randrange(len(ids) - prompt_len - reply_len)
            text = tokenizer.decode(ids[start : start + prompt_len])
            reply = tokenizer.decode(ids[start + prompt_len : start + prompt_len + reply_len])
            remember = f"\n\nRemember: {facts}" if where == "prompt" else ""
            note = f"I note this: {facts}\n\n" if where == "reply" else ""
            turns = [
                {"role": "user", "content": f"{text}{remember}\n\n{REQUEST}"},
                {"role": "assistant", "content": f"{note}{reply}"},
                {"role": "user", "content": f"What is the passcode of the {target}?"},
            ]
            conversation = chat_ids(tokenizer, turns)
            prompt_end = len(chat_ids(tokenizer, turns[:1]))
            forced = conversation[prompt_end:]
            samples.append(
                Sample(
                    f"{i}",
                    conversation[:prompt_end],
                    len(forced) + ANSWER_TOKENS,
                    {"where": where, "generated": len(forced)},
                    (forced, codes[target]),
                )
            )
        return samples

    async def measure(
        self, sample: Sample, setting: Setting, session: Session, client: Client
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Force the generation and the question, then let the model answer."""
        forced, code = sample.data
        body = forced_request(
            forced, {"fasa": session.fasa(setting)}, top_tokens=1, free_tokens=ANSWER_TOKENS
        )
        reply = await client.generate({"input_ids": sample.prompt, **body})
        require_followed(reply, forced)
        answer = session.tokenizer.decode(reply["output_ids"][len(forced) :])
        return {"accuracy": score(answer, code)}, {**reply, "text": answer}
