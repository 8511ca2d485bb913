"""A conversation that is tokenised as it grows."""

from __future__ import annotations

from typing import Any


class Transcript:
    """Messages and, if a tokenizer is given, their tokens.

    SGLang tokenises a whole conversation at every turn, in the process that also streams all
    replies; a client that sends tokens keeps long prompts from holding these up.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template; None leaves it to the server.
        system: What the conversation begins with.
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
        """Another conversation that begins as this one, its tokens shared so far."""
        other = Transcript(self._tokenizer, "")
        other.messages = list(self.messages)
        other._text, other._tokens = self._text, self._tokens
        return other

    def tokens(self, reply: bool = True) -> list[int] | None:
        """All messages as tokens; None without a tokenizer.

        Only what is new is tokenised, unless the template changes what came before.

        Args:
            reply: Whether they are the prompt of a reply.
        """
        if self._tokenizer is None:
            return None
        text = self._tokenizer.apply_chat_template(
            self.messages, tokenize=False, add_generation_prompt=reply
        )
        grown = text.startswith(self._text)
        new = self._tokenizer(text[len(self._text) if grown else 0 :], add_special_tokens=False)
        self._tokens = [*(self._tokens if grown else []), *new.input_ids]
        self._text = text
        return self._tokens
