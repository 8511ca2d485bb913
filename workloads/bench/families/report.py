"""The outcomes of trials as files, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

from fasa_sglang.workloads.bench.families.trial import NEW_TOKENS, PROMPT_LENGTHS, Trial
from fasa_sglang.workloads.models.families.family import Family
from fasa_sglang.workloads.models.families.table import FAMILIES

DEVICES = {"cpu": "CPU", "cuda": "GPU"}

_HEAD = f"""# Models that were tried

Written by `bash scripts/models.sh`; do not edit. [How a server decides which layers
select](deployment.md#models).

One tiny model of each family, with random weights, was served with FASA: in float32 on a CPU, in
bfloat16 on a GPU. "Served" means that, for prompts of {PROMPT_LENGTHS[0]}, {PROMPT_LENGTHS[1]} and
{PROMPT_LENGTHS[2]} tokens, {NEW_TOKENS} tokens that were decoded sparsely with a budget of the whole
context were those of dense decoding, up to near ties. Such a model shows that FASA reads the right
keys, not how well it selects; [results.md](results.md) shows the latter.

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
    """Write the outcomes of a device, in the order of the table of families."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {name: trials[name].to_dict() for name in FAMILIES if name in trials}
    (folder / f"{device}.json").write_text(json.dumps(entries, indent=1) + "\n")


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
    served = [device for device, trial in trials.items() if not trial.sentence]
    ended = {DEVICES[d]: trial.sentence for d, trial in trials.items() if trial.sentence}
    outcome = [f"served{family.note and ': '}{family.note}"] if served else []
    outcome += [f"{device}: “{sentence}”" for device, sentence in ended.items()]
    selecting = trials[served[0]].selecting if served else ()
    layers = trials[served[0]].num_layers if served else 0
    tried = [f"random weights on a {DEVICES[device]}" for device in trials]
    return [
        f"`{family.model_type}`{family.name.removeprefix(family.model_type)}",
        f"{len(selecting)} of {layers}" if served else "",
        "; ".join(outcome).replace("|", "\\|"),
        "; ".join([*tried, *filter(None, [family.other_runs])]),
        ", ".join(sorted({trial.sglang for trial in trials.values()})),
        " ".join(map(str, trials["cpu"].same_in_transformers)) if "cpu" in trials else "",
    ]
