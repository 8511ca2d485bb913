"""Texts to calibrate on: two that come with CPython, a file, or a Hugging Face dataset."""

from __future__ import annotations

import argparse
import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path

from fasa_sglang.errors import CalibrationError

CHARS_PER_TOKEN = 16
"""Upper bound of the characters per token of any tokenizer, for texts to read."""


@dataclass(frozen=True)
class Text:
    """A text and its name in the provenance."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the content in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def default_text() -> Text:
    """Return Python's language reference as ``help()`` shows it, 465 kB of English prose."""
    from pydoc_data.topics import topics

    return Text("pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics)))


def held_out_text() -> Text:
    """Return source code of the standard library, which differs in kind from ``default_text``."""
    return Text("argparse.py", inspect.getsource(argparse))


def text_file(path: str) -> Text:
    """Read a UTF-8 text file.

    Raises:
        CalibrationError: The file cannot be read.
    """
    try:
        return Text(Path(path).name, Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"cannot read the text {path} ({error}); give a UTF-8 text file with --text"
        ) from error


def dataset_text(name: str, num_chars: int) -> Text:
    """Join the ``text`` column of a Hugging Face dataset's training split.

    Args:
        name: Name of the dataset, or ``name:config``.
        num_chars: Number of characters to read, rounded up to whole rows.

    Raises:
        CalibrationError: The dataset cannot be read or has no text column.
    """
    from datasets import load_dataset

    path, _, config = name.partition(":")
    parts: list[str] = []
    try:
        for row in load_dataset(path, config or None, split="train", streaming=True):
            parts.append(row["text"])
            if sum(map(len, parts)) >= num_chars:
                break
    except Exception as error:  # datasets raises many types, among them those of the network
        raise CalibrationError(
            f"cannot read the dataset {name} ({type(error).__name__}: {error}); expected a dataset "
            "with a text column; or give a file with --text"
        ) from error
    return Text(name, "\n\n".join(parts))
