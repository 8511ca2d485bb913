"""The package's structure: who may import what, no circles, small files, a complete wheel."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "fasa_sglang"
# Folders at the top of the repository that install as subpackages.
MAPPED = {
    folder: f"{PACKAGE}.{folder}" for folder in ("calibration", "flashinfer_ext", "workloads")
}
MAX_LINES, MAX_MEDIAN_LINES = 400, 120

# The only modules and packages that may import each of these.
ALLOWED = {
    "sglang": (
        "fasa_sglang.backend",
        "fasa_sglang.platforms",
        "fasa_sglang.plugin",
        "fasa_sglang.commands.doctor",
        "fasa_sglang.commands.server_flags",
        "fasa_sglang.commands.calibrating_engine",
        "fasa_sglang.frontend",
        "fasa_sglang.workloads.serving",
    ),
    "flashinfer": ("fasa_sglang.flashinfer_ext",),
    "triton": ("fasa_sglang.ops",),
    "transformers": (
        "fasa_sglang.commands.doctor",
        "fasa_sglang.workloads.models",
    ),
    "lm_eval": ("fasa_sglang.workloads.eval.tasks",),
    "sgl_eval": ("fasa_sglang.workloads.eval.tasks",),
    "prometheus_client": ("fasa_sglang.backend.metrics",),
    "datasets": ("fasa_sglang.calibration.corpus", "fasa_sglang.workloads.eval.tasks"),
    "matplotlib": ("fasa_sglang.calibration.heatmap", "fasa_sglang.workloads.plots"),
    # The commands and the workloads use a server by files and requests only.
    "fasa_sglang.backend": (
        "fasa_sglang.backend",
        "fasa_sglang.plugin",
        "fasa_sglang.commands.doctor",
    ),
    "fasa_sglang.calibration": (
        "fasa_sglang.calibration",
        "fasa_sglang.backend",
        "fasa_sglang.commands",
        "fasa_sglang.workloads",
    ),
    "fasa_sglang.workloads": ("fasa_sglang.workloads", "fasa_sglang.cli"),
    "fasa_sglang.commands": ("fasa_sglang.commands", "fasa_sglang.cli"),
    "fasa_sglang.cli": (),
    "fasa_sglang.platforms": ("fasa_sglang.platforms",),
    # The planner is usable without SGLang; its lanes are what the backend plans a step with.
    "fasa_sglang.flashinfer_ext": (
        "fasa_sglang.flashinfer_ext",
        "fasa_sglang.backend",
        "fasa_sglang.workloads.bench",
    ),
    "fasa_sglang.pruning": ("fasa_sglang.pruning", "fasa_sglang.backend"),
}


def package_modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    modules = {}
    for folder, package in {PACKAGE: PACKAGE, **MAPPED}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = tuple(part for part in parts if part != "__init__")
            modules[".".join((package, *parts))] = path
    return modules


MODULES = package_modules()


def imports(path: Path) -> set[str]:
    """Names that a module imports anywhere, also inside functions, and modules that it names.

    A string that is the name of one of our modules counts, because it is imported by that name.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in MODULES else node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if name in MODULES and name != PACKAGE:
                names.add(name)
    return names


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of a circle in a directed graph; empty if there is none."""
    finished: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node not in finished:
            for successor in sorted(graph[node]):
                circle = visit(successor, [*trail, node])
                if circle:
                    return circle
            finished.add(node)
        return []

    for node in graph:
        circle = visit(node, [])
        if circle:
            return circle
    return []


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_what_it_may(name: str) -> None:
    for imported in imports(MODULES[name]):
        for package, places in ALLOWED.items():
            if within(imported, package):
                assert any(within(name, place) for place in places), (
                    f"{name} imports {imported}, which only {places or 'no module'} may import"
                )
        assert imported.split(".")[0] not in MAPPED, f"{name}: import fasa_sglang.{imported}"


def test_modules_import_each_other_without_a_circle() -> None:
    graph = {
        name: {imported for imported in imports(path) if imported in MODULES and imported != name}
        for name, path in MODULES.items()
    }
    assert find_circle(graph) == []


def test_find_circle_of_a_graph_with_one_returns_it() -> None:
    assert find_circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


def test_modules_are_small() -> None:
    lines = {name: path.read_text().count("\n") for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    assert statistics.median(lines.values()) <= MAX_MEDIAN_LINES


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert sorted(folders) == sorted(setuptools["packages"])


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_command_line_help_imports_neither_torch_nor_sglang(flag: str) -> None:
    code = (
        "import sys\n"
        "from fasa_sglang.cli import main\n"
        "try:\n"
        f"    main(['{flag}'])\n"
        "finally:\n"
        "    assert not {'torch', 'sglang', 'transformers'} & set(sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
