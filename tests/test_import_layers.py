"""Imports point one way, and the run side never imports the compiler."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tq_tvm

PACKAGE = Path(tq_tvm.__file__).parent
SCHEDULES = PACKAGE.parent / "schedules"

# A layer may import the layers of its set, and itself.
BASE = {"formats", "spec", "served", "errors", "env", "targets", "splits", "_version"}
COMPILER = BASE | {"reference", "_fast_stack", "kernels"}
RUN = BASE | {"artifacts"}
ALLOWED = {
    "_version": set(),
    "errors": set(),
    "formats": {"errors"},
    "spec": {"errors", "formats"},
    "served": {"errors", "formats", "spec"},
    "env": {"errors", "_version"},
    "targets": {"errors", "env", "served", "spec"},
    "splits": {"spec"},
    "model_config": {"errors", "spec"},
    "_fast_stack": set(),
    "reference": BASE,
    "kernels": COMPILER,
    "schedules": COMPILER,
    "tuning": COMPILER | {"schedules", "tuning_logs", "build", "bench"},
    "build": COMPILER | {"schedules", "tuning_logs", "tuning", "artifacts"},
    "artifacts": BASE,
    "ops": RUN,
    "__init__": RUN | {"ops"},
}
RUN_SIDE = {*BASE, "artifacts", "ops", "__init__"}


def sources():
    files = [(path.relative_to(PACKAGE), path) for path in sorted(PACKAGE.rglob("*.py"))]
    if SCHEDULES.is_dir():
        files += [
            (Path("schedules") / path.relative_to(SCHEDULES), path)
            for path in sorted(SCHEDULES.rglob("*.py"))
        ]
    return [
        pytest.param(name.parts[0].removesuffix(".py"), path, id=str(name)) for name, path in files
    ]


def imported_modules(path):
    """Full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            if node.module == "tq_tvm":
                yield from (f"tq_tvm.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize(("layer", "path"), sources())
def test_imports_point_one_way(layer, path):
    if layer not in ALLOWED:
        pytest.skip(f"{layer} is above all layers")
    modules = {name for name in imported_modules(path) if name.startswith("tq_tvm.")}
    layers = {name.split(".")[1] for name in modules} - {layer, "__version__"}
    assert layers <= ALLOWED[layer], f"{layer} must not import {layers - ALLOWED[layer]}"


@pytest.mark.parametrize(("layer", "path"), sources())
def test_run_side_has_no_compiler(layer, path):
    if layer not in RUN_SIDE:
        pytest.skip(f"{layer} is not on the run side")
    assert "tvm" not in {name.split(".")[0] for name in imported_modules(path)}


@pytest.mark.parametrize(("layer", "path"), sources())
def test_the_environment_is_read_in_one_place(layer, path):
    names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert layer == "env" or not names & {"environ", "getenv", "putenv"}


def test_public_modules_do_not_import_the_compiler():
    program = "import sys, tq_tvm, tq_tvm.artifacts, tq_tvm.ops; sys.exit('tvm' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_exist():
    assert sorted(tq_tvm.__all__) == tq_tvm.__all__
    for name in tq_tvm.__all__:
        assert hasattr(tq_tvm, name)
