"""The tree as a contract: who may import what, and nothing left out of the wheel."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {
    folder: f"fasa_sglang.{folder}" for folder in ("calibration", "flashinfer_ext", "workloads")
}
# Heavy packages, and the only places that may import them.
ALLOWED = {
    "sglang": (
        "fasa_sglang.backend",
        "fasa_sglang.platforms",
        "fasa_sglang.plugin",
        "fasa_sglang.commands.doctor",
        "fasa_sglang.frontend",
        "fasa_sglang.workloads.serving.engine",
        "fasa_sglang.workloads.serving.forced",
    ),
    "flashinfer": ("fasa_sglang.flashinfer_ext",),
    "triton": ("fasa_sglang.ops",),
    "transformers": (
        "fasa_sglang.calibration",
        "fasa_sglang.commands.doctor",
        "fasa_sglang.workloads.models.shapes",
        "fasa_sglang.workloads.models.packaged",
    ),
    "lm_eval": ("fasa_sglang.workloads.eval.tasks.lm_eval_task",),
    "sgl_eval": ("fasa_sglang.workloads.eval.tasks.sgl_eval_task",),
    "prometheus_client": ("fasa_sglang.backend.metrics",),
    "datasets": (
        "fasa_sglang.calibration.corpus",
        "fasa_sglang.workloads.eval.tasks.lm_eval_task",
    ),
    "matplotlib": ("fasa_sglang.calibration.heatmap", "fasa_sglang.workloads.plots"),
    # The calibration and the workloads meet the server only through files and requests.
    "fasa_sglang.backend": (
        "fasa_sglang.backend",
        "fasa_sglang.plugin",
        "fasa_sglang.commands.doctor",
        "fasa_sglang.commands.serve",
    ),
    "fasa_sglang.calibration": ("fasa_sglang.calibration", "fasa_sglang.workloads"),
    "fasa_sglang.workloads": ("fasa_sglang.workloads",),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in {"fasa_sglang": "fasa_sglang", **MAPPED}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = tuple(part for part in parts if part != "__init__")
            found.append((".".join((package, *parts)), path))
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: str(value).split("/")[-1])
def test_module_imports_only_what_its_folder_may(name: str, path: Path) -> None:
    for imported in imports(path):
        for package, places in ALLOWED.items():
            if within(imported, package):
                assert any(within(name, place) for place in places), (
                    f"{name} imports {imported}, which is for {places or 'nobody yet'}"
                )
        assert imported.split(".")[0] not in MAPPED, f"{name}: import fasa_sglang.{imported}"


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name for name, path in modules() if path.name == "__init__.py"}
    assert sorted(folders) == sorted(setuptools["packages"])
