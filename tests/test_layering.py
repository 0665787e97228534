"""What may import what, and that README names files, commands and code that exist."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nl_detectron
from tests.running import ROOT

PACKAGE = ROOT / "nl_detectron"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# A module imports only from layers before its own.
LAYERS = [
    [
        "console",
        "paths",
        "config",
        "cells",
        "evaluation",
        "flipping",
        "flops",
        "frames",
        "metadata",
    ],
    ["ops", "weight_scale", "coco_results", "coco_files"],
    ["non_local", "canvas"],
    ["backbone", "keypoint_head", "checkpoint", "attention", "cost", "data_sets", "pictures"],
    ["engine", "health", "model_cost", "config_blocks"],
    ["twins", "launch", "queries"],
    ["__init__"],
    ["env"],
]


def imports(path, tree=None):
    """Absolute names of the modules that a file, or a part of its syntax tree, imports."""
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{path.parent.name}.{node.module}" if node.level else node.module
            # `from nl_detectron import ops` imports a module, `... import NonLocalBlock` does not.
            modules = [alias.name for alias in node.names if alias.name in MODULES]
            if module == PACKAGE.name and modules:
                yield from (f"{module}.{name}" for name in modules)
            else:
                yield module


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


def layer(module):
    return next(i for i, names in enumerate(LAYERS) if module in names)


def test_every_module_has_a_layer():
    assert sorted(itertools.chain(*LAYERS)) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    for name in imports(PACKAGE / f"{module}.py"):
        top, _, rest = name.partition(".")
        assert top not in ("tools", "projects", "tests"), name
        if top == PACKAGE.name and rest != "weights":  # which stand alone, see below
            assert layer(rest or "__init__") < layer(module), f"{module} imports {name}"


@pytest.mark.parametrize(
    "path", [PACKAGE / "paths.py", PACKAGE / "ops.py", ROOT / "tests" / "oracles.py"]
)
def test_science_and_its_oracles_need_torch_alone(path):
    own = {"nl_detectron"} if path.stem == "ops" else set()  # its paths
    assert packages(path) - sys.stdlib_module_names == {"torch"} | own


def test_weights_stand_alone():
    """Their modules import each other in one direction, and nothing else of the package."""
    order = ["dialects", "names", "blocks", "files", "convert", "report", "__init__"]
    assert {path.stem for path in (PACKAGE / "weights").glob("*.py")} == set(order)
    for i, module in enumerate(order):
        path = PACKAGE / "weights" / f"{module}.py"
        lower = {f"nl_detectron.weights.{name}" for name in order[:i]}
        ours = {name for name in imports(path) if name.startswith("nl_detectron")}
        assert ours <= lower, module
        assert packages(path) - sys.stdlib_module_names <= {"torch", "numpy", "nl_detectron"}


def test_hook_imports_nothing_before_it_is_called():
    tree = ast.parse((PACKAGE / "env.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if not isinstance(statement, ast.FunctionDef):
            assert list(imports(PACKAGE / "env.py", statement)) == []


def test_detectron2_is_imported_first():
    path = PACKAGE / "__init__.py"
    docstring, console, first, *_ = ast.parse(path.read_text(encoding="utf-8")).body
    assert list(imports(path, console)) == ["nl_detectron.console"]
    assert packages(PACKAGE / "console.py") <= sys.stdlib_module_names
    assert list(imports(path, first)) == ["detectron2", "detectron2.modeling"]


def test_public_names_are_our_own():
    """And those of submodules, which Python adds."""
    names = {name for name in dir(nl_detectron) if not name.startswith("_")}
    assert names - {*MODULES, "weights"} == set(nl_detectron.__all__)


def test_projects_do_not_import_each_other():
    projects = [path for path in (ROOT / "projects").iterdir() if path.is_dir()]
    for project in projects:
        others = {path.name for path in projects} - {project.name}
        for path in project.rglob("*.py"):
            assert not packages(path) & others, path


def test_tools_are_no_package():
    """An __init__.py would hide the package `tools` that an installed detectron2 leaves behind."""
    assert not (ROOT / "tools" / "__init__.py").exists()
    for name in set(re.findall(r"python -m (tools\.\w\w+)", README)):
        code = f"import importlib.util as u; print(u.find_spec({name!r}).origin)"
        run = [sys.executable, "-c", code]
        origin = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        assert not Path(origin.stdout).is_relative_to(ROOT / "tools")


def test_paths_in_readme():
    folders = "nl_detectron|configs|tools|projects|tests"
    paths = set(re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", README))
    paths |= set(re.findall(r"`(Makefile|LICENSE|[\w-]+\.(?:txt|toml|md))`", README))
    paths |= set(re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))
    paths.discard("tools/x.py")  # any of them
    assert "nl_detectron/ops.py" in paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_make_targets_in_readme():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([\w-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.slow
@pytest.mark.parametrize("code", CODE)
def test_code_in_readme(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(code, {})
