"""The agent loop as a task: tool calls and answers, branch by branch."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from fasa_sglang.workloads.agent_loop import Answer, run_agents
from fasa_sglang.workloads.eval.results import Row
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.task import Options, Session, Task
from fasa_sglang.workloads.serving.server import flush_prefix_cache

TURNS = 3
# Kind of answer that each metric counts.
KINDS = {"answers": "answer", "calls": "call"}


class AgentLoop(Task):
    """Metrics: the share of right answers from tool outputs, and of right tool calls.

    All ``--limit`` branches run at once over a shared prefix of ``--length`` tokens, so a setting
    that was interrupted starts again.
    """

    name = "agent"
    metrics: ClassVar = {"answers": "share of right answers", "calls": "share of right tool calls"}

    def prepare(self, tokenizer: Any, options: Options) -> int:
        """See ``Task.prepare``."""
        self.branches, self.prefix_tokens = options.limit, options.length
        return self.branches

    def evaluate(self, settings: Sequence[Setting], session: Session) -> None:
        """See ``Task.evaluate``."""
        for setting in settings:
            self._evaluate(setting, session)

    def _evaluate(self, setting: Setting, session: Session) -> None:
        names = [f"branch-{i}" for i in range(self.branches)]
        missing = [name for name in names if session.results.find(name, setting.name) is None]
        if not missing:
            return
        flush_prefix_cache(session.url)
        start = time.perf_counter()
        answers = asyncio.run(
            run_agents(
                session.url,
                branches=self.branches,
                turns=TURNS,
                prefix_tokens=self.prefix_tokens,
                seed=session.options.seed,
                fasa=session.fasa(setting),
            )
        )
        seconds = time.perf_counter() - start
        for i, name in enumerate(names):
            if name in missing:
                own = [answer for answer in answers if answer.branch == i]
                session.results.add(_row(name, setting, own, seconds))
                session.advance()


def _row(name: str, setting: Setting, answers: Sequence[Answer], seconds: float) -> Row:
    ratios = [answer.kv_read_ratio for answer in answers if answer.kv_read_ratio is not None]
    return Row(
        sample=name,
        setting=setting.name,
        metrics={
            metric: statistics.mean(answer.correct for answer in answers if answer.kind == kind)
            for metric, kind in KINDS.items()
        },
        info={"turns": TURNS},
        prompt_tokens=max(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
        kv_read_ratio=statistics.mean(ratios) if ratios else None,
        seconds=seconds,
        text=answers[-1].text,
    )
