"""The label widths and formats that benchmarks compare, by name: ``half-fp8``."""

from __future__ import annotations

from fractions import Fraction

from fasa_sglang.config import FasaConfig
from fasa_sglang.ops.label_format import LABEL_FORMATS, LabelFormat

# Share of a head's frequency chunks that a label holds.
SHARES = {"quarter": Fraction(1, 4), "three-eighths": Fraction(3, 8), "half": Fraction(1, 2)}
LABELS: dict[str, tuple[Fraction, LabelFormat]] = {
    f"{name}-{label_format.name}": (share, label_format)
    for label_format in LABEL_FORMATS.values()
    for name, share in SHARES.items()
}
# What servers use unless a setting says otherwise.
DEFAULT_LABELS = f"half-{FasaConfig.label_dtype}"
