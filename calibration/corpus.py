"""Texts to calibrate on: two that every CPython carries, a file, or a Hugging Face dataset."""

from __future__ import annotations

import argparse
import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path

from fasa_sglang.errors import CalibrationError


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hash of the content, UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def default_text() -> Text:
    """Python's own language reference as ``help()`` shows it, about 465 kB of English prose."""
    from pydoc_data.topics import topics

    return Text("pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics)))


def held_out_text() -> Text:
    """Source code of the standard library: a text of another kind than ``default_text``."""
    return Text("argparse.py", inspect.getsource(argparse))


def text_file(path: str) -> Text:
    """A UTF-8 text file of the user's.

    Raises:
        CalibrationError: It cannot be read.
    """
    try:
        return Text(Path(path).name, Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"cannot read the text {path} ({error}); give a UTF-8 text file with --text"
        ) from error


def dataset_text(name: str, num_chars: int) -> Text:
    """The ``text`` column of a Hugging Face dataset's training split, joined.

    Args:
        name: Dataset name, or ``name:config``.
        num_chars: Stop after this many characters.

    Raises:
        CalibrationError: The dataset cannot be had or has no text.
    """
    from datasets import load_dataset

    path, _, config = name.partition(":")
    parts: list[str] = []
    try:
        for row in load_dataset(path, config or None, split="train", streaming=True):
            parts.append(row["text"])
            if sum(map(len, parts)) >= num_chars:
                break
    except Exception as error:  # the library raises many kinds, down to the network's
        raise CalibrationError(
            f"cannot read the dataset {name} ({type(error).__name__}: {error}); expected a dataset "
            "with a text column; or give a file with --text"
        ) from error
    return Text(name, "\n\n".join(parts))
