"""The table of families, by name."""

from __future__ import annotations

from fasa_sglang.workloads.models.families import dense, experts, hybrids
from fasa_sglang.workloads.models.families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*dense.FAMILIES, *experts.FAMILIES, *hybrids.FAMILIES)
}
