"""A conversation that is tokenised incrementally as it grows."""

from __future__ import annotations

from typing import Any


class Transcript:
    """Messages and, if a tokenizer is given, their tokens.

    SGLang tokenises the whole conversation on every turn, in the process that also streams all
    replies. A client that sends tokens keeps long prompts from delaying those replies.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template; None leaves tokenising to the
            server.
        system: Content of the system message that opens the conversation.
    """

    def __init__(self, tokenizer: Any | None, system: str) -> None:
        self.messages: list[dict[str, str]] = []
        self._tokenizer = tokenizer
        self._text = ""
        self._tokens: list[int] = []
        self.add("system", system)

    def add(self, role: str, content: str) -> None:
        """Append a message."""
        self.messages.append({"role": role, "content": content})

    def copy(self) -> Transcript:
        """A conversation that starts with the same messages and shares their tokens."""
        other = Transcript(self._tokenizer, "")
        other.messages = list(self.messages)
        other._text, other._tokens = self._text, self._tokens
        return other

    def tokens(self, reply: bool = True) -> list[int] | None:
        """All messages as tokens; None without a tokenizer.

        Only new text is tokenised, unless the template rewrites earlier messages.

        Args:
            reply: Whether to append the template's prompt for a reply.
        """
        if self._tokenizer is None:
            return None
        text = self._tokenizer.apply_chat_template(
            self.messages, tokenize=False, add_generation_prompt=reply
        )
        extends = text.startswith(self._text)
        new = self._tokenizer(text[len(self._text) if extends else 0 :], add_special_tokens=False)
        self._tokens = [*(self._tokens if extends else []), *new.input_ids]
        self._text = text
        return self._tokens
