"""The outcomes of trials as files, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

from fasa_sglang.workloads.bench.families.trial import NEW_TOKENS, PROMPT_LENGTHS, Trial
from fasa_sglang.workloads.models.families.family import Family
from fasa_sglang.workloads.models.families.table import FAMILIES

DEVICES = {"cpu": "CPU", "cuda": "GPU"}

_LENGTHS = ", ".join(map(str, PROMPT_LENGTHS))
_HEAD = f"""# Models that were tried

Written by `bash scripts/models.sh`; do not edit. [How a server decides which layers
select](deployment.md#models).

A tiny model of each family, with random weights, was served with FASA: in float32 on a CPU, in
bfloat16 on a GPU. "Served" means that with a budget of the whole context, sparse decoding gave the
tokens of dense decoding, {NEW_TOKENS} for each of three prompts of {_LENGTHS} tokens, up to
near ties. This shows that FASA reads the right keys, not how well it selects;
[results.md](results.md) shows the latter.

"Refused" are models that FASA refuses. Where "SGLang fails", it does so without FASA, too.

The column "as transformers" is the number of dense tokens, of {NEW_TOKENS} for each prompt, before
the first that differs from transformers' in float32. It concerns SGLang, not FASA.

"""
_COLUMNS = ("family", "layers that select", "outcome", "tried with", "SGLang", "as transformers")


def load_trials(folder: Path, device: str) -> dict[str, Trial]:
    """The outcomes of a device by the names of families; empty if there are none."""
    path = folder / f"{device}.json"
    if not path.exists():
        return {}
    return {name: Trial.from_dict(entry) for name, entry in json.loads(path.read_text()).items()}


def save_trials(folder: Path, device: str, trials: dict[str, Trial]) -> None:
    """Write the outcomes of a device, one per line, in the order of the table of families."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {name: trials[name].to_dict() for name in FAMILIES if name in trials}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    (folder / f"{device}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_page(folder: Path) -> None:
    """Write the table of all outcomes in ``folder`` to a page beside it, ``<folder>.md``."""
    trials = {device: load_trials(folder, device) for device in DEVICES}
    lines = [_row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    for name, family in FAMILIES.items():
        own = {device: found[name] for device, found in trials.items() if name in found}
        if own:
            lines.append(_row(_cells(family, own)))
    folder.with_suffix(".md").write_text(_HEAD + "\n".join(lines) + "\n")


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(family: Family, trials: dict[str, Trial]) -> list[str]:
    served = next((trial for trial in trials.values() if not trial.sentence), None)
    suffix = family.name.removeprefix(family.model_type)
    tried = [f"random weights on a {DEVICES[device]}" for device in trials]
    return [
        f"`{family.model_type}`{suffix}",
        f"{len(served.selecting)} of {served.num_layers}" if served else "",
        "; ".join([*_outcomes(family, trials), *filter(None, [family.note])]).replace("|", "\\|"),
        ", ".join([*tried, *filter(None, [family.other_runs])]),
        ", ".join(sorted({trial.sglang for trial in trials.values()})),
        " ".join(map(str, trials["cpu"].same_in_transformers)) if "cpu" in trials else "",
    ]


def _outcomes(family: Family, trials: dict[str, Trial]) -> list[str]:
    texts = {device: _outcome(trial) for device, trial in trials.items()}
    if len(set(texts.values())) > 1:
        return [f"on a {DEVICES[device]} {text}" for device, text in texts.items()]
    [text] = set(texts.values())
    if family.needs_gpu and "cuda" not in trials:
        return ["needs a GPU", f"on a CPU {text}"]
    return [text]


def _outcome(trial: Trial) -> str:
    if not trial.sentence:
        return "served"
    return f"{'refused' if trial.refused else 'SGLang fails'}: “{trial.sentence}”"
