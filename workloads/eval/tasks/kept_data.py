"""Generated datasets, kept in the user's cache.

RULER's generators fit every prompt to its length by tokenising it over and over: minutes a task at
16k tokens, too long to be done again whenever a run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from fasa_sglang.calibration_cache import cache_dir


def kept(
    key: Mapping[str, Any], tokenizer: Any, limit: int, make: Callable[[], Mapping[str, Any]]
) -> Any:
    """A ``datasets.DatasetDict`` as ``make`` gave it once, cut to ``limit`` documents a split.

    Args:
        key: All that the documents depend on beside the tokenizer and ``limit``.
        tokenizer: Known by its vocabulary, so that copies of a model share their data.
        limit: Most documents of a split.
        make: Splits by name.
    """
    from datasets import DatasetDict, load_from_disk

    whole = [dict(key), limit, sorted(tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "data" / f"{key['task']}-{digest}"
    if not folder.is_dir():
        made = {name: split.select(range(min(limit, len(split)))) for name, split in make().items()}
        part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        DatasetDict(made).save_to_disk(part)
        # At once, and the first of two runs wins.
        try:
            part.rename(folder)
        except OSError:
            shutil.rmtree(part)
    return load_from_disk(folder)
