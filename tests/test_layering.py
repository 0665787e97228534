"""What may import what, and that README names files, commands and code that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nl_detectron
from nl_detectron_cli import COMMANDS
from tests.running import ROOT

PACKAGE = ROOT / "nl_detectron"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# The modules of a room, each of which imports only from those before it, and the rooms, each of
# which imports only from those named with it.
ROOMS = {
    "safety": "pickles checkpoints configs folders",
    "": "paths ops config norm parts padding non_local backbone keypoint_head __init__ env",
    "model_zoo": "files model_zoo",
    "weights": "networks dialects names video blocks files convert report config_model "
    "video_config",
    "analysis": "geometry drawing.colors drawing.strip drawing.canvas drawing.figures attention "
    "queries health cost detector_cost",
    "engine": "console frames options randomness history loader precise_bn checkpoint_files lock "
    "checkpoint checkpoint_hooks optimize predictor export schedule signals failures step "
    "training_model trainer ablation launch coco.flipping coco.findings coco.files "
    "coco.annotations coco.image_files coco.checking coco.metadata coco.data_sets coco.evaluation "
    "coco.results coco.trainer",
}
ALLOWED = {"safety": [], "": ["safety"]}
ALLOWED |= dict.fromkeys(("model_zoo", "weights", "analysis", "engine"), ["safety", ""])


def module_name(path):
    """Of a file of the package, below it; a package's __init__ has the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOM_OF = {
    f"{room}.{name}".lstrip("."): room for room, names in ROOMS.items() for name in names.split()
}
ORDER = list(ROOM_OF)


def imports(path, tree=None):
    """Absolute names of the modules that a file, or a part of its syntax tree, imports."""
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{path.parent.name}.{node.module}" if node.level else node.module
            # `from nl_detectron import ops` imports a module, `... import NonLocalBlock` does not.
            names = [f"{module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if name.partition(".")[2] in MODULES]
            yield from modules or [module]


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


def own_imports(name):
    """The modules of the package that one of them imports."""
    for imported in imports(MODULES[name]):
        top, _, rest = imported.partition(".")
        assert top not in ("nl_detectron_cli", "tools", "projects", "tests", "dev"), imported
        if top == PACKAGE.name:
            yield rest or "__init__"


def test_every_module_has_a_place():
    packages = {name for name, path in MODULES.items() if path.stem == "__init__"} - {"__init__"}
    assert set(MODULES) - packages == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    for imported in own_imports(name):
        if imported not in ROOM_OF:  # a package: as one of its modules
            imported = max(
                (other for other in ORDER if other.startswith(imported)), key=ORDER.index
            )
        room = ROOM_OF[imported]
        if room == ROOM_OF[name]:
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"
        else:
            assert room in ALLOWED[ROOM_OF[name]], f"{name} imports {imported}"


@pytest.mark.parametrize(
    "path", [PACKAGE / "paths.py", PACKAGE / "ops.py", ROOT / "tests" / "oracles.py"]
)
def test_science_and_its_oracles_need_torch_alone(path):
    own = {"nl_detectron"} if path.stem == "ops" else set()  # its paths
    assert packages(path) - sys.stdlib_module_names == {"torch"} | own


def test_weights_are_converted_without_a_model():
    """Only for a config is one built, or read."""
    for module in ROOMS["weights"].split()[:-2]:
        name = f"weights.{module}"
        assert all(imported.startswith(("weights.", "safety.")) for imported in own_imports(name))
        assert packages(MODULES[name]) - sys.stdlib_module_names <= {"torch", "numpy", PACKAGE.name}


def test_safe_reading_needs_no_detector():
    third_party = {"torch", "numpy", "yaml"}
    for module in ROOMS["safety"].split():
        path = MODULES[f"safety.{module}"]
        assert packages(path) - sys.stdlib_module_names <= third_party | {PACKAGE.name}


def test_hook_imports_nothing_before_it_is_called():
    tree = ast.parse((PACKAGE / "env.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if not isinstance(statement, ast.FunctionDef):
            assert list(imports(PACKAGE / "env.py", statement)) == []


def test_detectron2_is_imported_first():
    path = PACKAGE / "__init__.py"
    _, warnings, first, *_ = ast.parse(path.read_text(encoding="utf-8")).body
    assert list(imports(path, warnings)) == ["warnings"]
    assert list(imports(path, first)) == ["detectron2", "detectron2.modeling"]


def test_public_names_are_our_own():
    """And those of submodules, which Python adds."""
    names = {name for name in dir(nl_detectron) if not name.startswith("_")}
    assert names - {name.partition(".")[0] for name in MODULES} == set(nl_detectron.__all__)


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
    folders = "nl_detectron|nl_detectron_cli|configs|dev|tools|projects|tests"
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


def test_commands_in_readme():
    named = set(re.findall(r"nl-detectron ([a-z-]+)", README))
    assert "train" in named
    assert named <= set(COMMANDS)


def test_tests_in_the_table_of_faults():
    table = (ROOT / "tests" / "torture" / "README.md").read_text(encoding="utf-8")
    rows = [
        row.rpartition(" | ")[2] for row in table.splitlines() if "test_" in row and row[0] == "|"
    ]
    for row in rows:
        source = ""
        for file, name in re.findall(r"`(?:([\w/]+\.py)(?:::)?)?(\w*)`", row):
            if file:
                source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not name or re.search(rf"(?:def|class) {name}\b", source), f"{file} {name}"
    assert len(rows) > 40


@pytest.mark.slow
@pytest.mark.parametrize("code", CODE)
def test_code_in_readme(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(code, {})
