"""The agent loop of ``fasa bench agent`` as a task: tool calls and answers, branch by branch."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any

from fasa_sglang.workloads.bench.agent import drive
from fasa_sglang.workloads.eval.results import Row
from fasa_sglang.workloads.eval.settings import Setting
from fasa_sglang.workloads.eval.tasks.base import Options, Session, Task
from fasa_sglang.workloads.serving.server import flush_prefix_cache

TURNS = 3


class AgentLoop(Task):
    """Metrics: share of tool calls that were right, and of answers from tool outputs.

    All ``--limit`` branches run at once over a shared prefix of ``--length`` tokens, so a setting
    that was cut short begins again.
    """

    metrics = ("answers", "calls")

    def prepare(self, tokenizer: Any, options: Options) -> int:
        """See ``Task``."""
        self.branches, self.prefix_tokens = options.limit, options.length
        return self.branches

    def evaluate(self, settings: Sequence[Setting], session: Session) -> None:
        """See ``Task``."""
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
            drive(
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
            mine = [answer for answer in answers if answer.branch == i]
            ratios = [answer.kv_read_ratio for answer in mine if answer.kv_read_ratio is not None]
            if name in missing:
                kinds = {"answers": "answer", "calls": "call"}
                session.results.add(
                    Row(
                        name,
                        setting.name,
                        {
                            metric: statistics.mean(a.right for a in mine if a.kind == kind)
                            for metric, kind in kinds.items()
                        },
                        {"turns": TURNS},
                        max(answer.prompt_tokens for answer in mine),
                        sum(answer.completion_tokens for answer in mine),
                        statistics.mean(ratios) if ratios else None,
                        seconds,
                        mine[-1].text,
                    )
                )
                session.advance()
