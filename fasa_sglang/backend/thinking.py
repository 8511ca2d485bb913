"""Where the thinking of a running request ends, for requests with ``prune: think``."""

from __future__ import annotations

from typing import Any

from fasa_sglang.config import FasaConfig
from fasa_sglang.names import REQ_ATTRIBUTE


def thinking_end(req: Any, config: FasaConfig) -> int | None:
    """Position at which a request stopped thinking; None while it thinks.

    The setting ``think_end_ids`` wins over SGLang's reasoning parser. A request for which neither
    applies never thinks: its thinking ends where its prompt does.

    Args:
        req: SGLang's ``Req``.
        config: The server's settings.
    """
    prompt_len = len(req.origin_input_ids)
    if config.think_end_ids:
        state = getattr(req, REQ_ATTRIBUTE, None)
        if state is None:  # Not scheduled yet, so there is no reply.
            return None
        end = state.prune.thinking.advance(req.output_ids, config.think_end_ids)
        return None if end is None else prompt_len + end
    if not req.require_reasoning:
        return prompt_len
    return prompt_len + req.reasoning_tokens if req._is_reasoning_over else None
