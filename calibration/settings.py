"""How to calibrate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fasa_sglang.calibration.rankers import RANKERS
from fasa_sglang.errors import CalibrationError

DEFAULT_TOKENS = 4096
DEFAULT_TOP_K = 256


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate.

    Args:
        ranker: The measure that orders the chunks; see ``rankers.rank_statistics``.
        num_fcs: Default number of chunks that a server reads; None takes
            ``ModelShape.default_num_fcs``.
        tokens: Length of the text in the model's tokens; None takes ``DEFAULT_TOKENS``, or the
            model's context if that is shorter.
        top_k: K of the rankers and of the held-out figures, in tokens; None takes
            ``DEFAULT_TOP_K``, or a quarter of the text if that is less.
        num_queries: Number of queries sampled from the second half of the text.
        seed: Seed of that sample.

    Raises:
        CalibrationError: A value is out of its range.
    """

    ranker: str = "deviation"
    num_fcs: int | None = None
    tokens: int | None = None
    top_k: int | None = None
    num_queries: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranker not in RANKERS:
            raise CalibrationError(
                f"ranker must be one of {', '.join(RANKERS)}, got {self.ranker!r}"
            )
        if self.num_queries < 1:
            raise CalibrationError(f"num_queries must be at least 1, got {self.num_queries}")
        if self.num_fcs is not None and self.num_fcs < 1:
            raise CalibrationError(f"num_fcs must be at least 1, got {self.num_fcs}")
        if self.top_k is not None and self.top_k < 1:
            raise CalibrationError(f"top_k must be at least 1, got {self.top_k}")
        least = 4 * (self.top_k or 1)
        if self.tokens is not None and self.tokens < least:
            raise CalibrationError(
                f"tokens must be at least 4 * top_k = {least}, got {self.tokens}; pass a larger "
                "--tokens or a smaller --top-k"
            )

    def for_context(self, context: int | None) -> CalibrationSettings:
        """Fill in the defaults that depend on the model's context.

        Args:
            context: The longest text that the server can prefill, in tokens; None if unknown.

        Raises:
            CalibrationError: The text is longer than the context, or too short for ``top_k``.
        """
        limit = DEFAULT_TOKENS if context is None else context
        tokens = self.tokens or min(DEFAULT_TOKENS, limit)
        if context is not None and tokens > context:
            raise CalibrationError(
                f"a calibration over {tokens} tokens does not fit the {context} tokens of the "
                "model's context or of the KV pool; pass a smaller --tokens"
            )
        return replace(self, tokens=tokens, top_k=self.top_k or min(DEFAULT_TOP_K, tokens // 4))
