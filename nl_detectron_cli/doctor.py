"""Check that everything nl_detectron needs is installed and works; print how to fix it if not.

Each line is ok, a note, a warning or an error. The exit code is 0 without warnings and errors, 1
with warnings, 2 with errors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from nl_detectron_cli import probes
from nl_detectron_cli.arguments import command_parser
from nl_detectron_cli.probes import probe

STATES = {"ok": 0, "note": 0, "warning": 1, "error": 2}
"""Exit code of each state."""

ROOT = Path(__file__).resolve().parents[1]
TESTED = Path(__file__).with_name("tested.json")
PYTHON = shlex.quote(sys.executable)
PIP = f"{PYTHON} -m pip install"
DETECTRON2 = (
    "git+https://github.com/facebookresearch/detectron2.git"
    "@02b5c4e295e990042a714712c21dc79b731e8833"
)
# Names on the package index that differ from the module's.
PROJECTS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "hydra": "hydra-core",
    "pkg_resources": "'setuptools<81'",
    "torch": "torch torchvision",
    "torchvision": "torch torchvision",
    "yaml": "pyyaml",
}

COCO = {
    f"{prefix}coco_{year}_{split}": (
        f"coco/{split}{year}",
        f"coco/annotations/{kind}_{split}{year}.json",
    )
    for prefix, kind in (("", "instances"), ("keypoints_", "person_keypoints"))
    for year in (2014, 2017)
    for split in ("train", "val")
}
"""Image folder and annotation file of each data set, by name."""


class Check(NamedTuple):
    """One line of the report."""

    name: str
    state: str
    found: str
    mend: str = ""
    """Command that fixes a warning or an error."""


def mend(module: str, facts: dict[str, Any]) -> str:
    """Return the command that installs a missing module, or reinstalls a broken one."""
    missing = facts.get("missing") or ""
    module = (missing or module).split(".")[0]
    again = "" if missing == module else "--force-reinstall "
    if module == "detectron2":
        installer = ROOT / "dev" / "install_detectron2.py"
        if installer.exists():
            source = " --source upstream" if "works" in facts else ""  # or it would be kept
            return f"{PYTHON} {shlex.quote(str(installer))}{source}"
        return f"{PIP} {again}--no-build-isolation {DETECTRON2}"
    if module == "nl_detectron" and (ROOT / "setup.py").exists():
        return f"{PIP} --no-deps --editable {shlex.quote(str(ROOT))}"
    return f"{PIP} {again}{PROJECTS.get(module, module)}"


def failed(name: str, module: str, facts: dict[str, Any]) -> Check:
    """Return the check of a module that does not work."""
    return Check(name, "error", " ".join(facts["failure"].split()), mend(module, facts))


def check_python() -> list[Check]:
    """Check the Python version."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    old = sys.version_info < (3, 11)
    command = "python3.11 -m venv .venv" if old else ""
    return [Check("Python", "error" if old else "ok", f"{found}, {sys.executable}", command)]


def check_torch() -> list[Check]:
    """Check torch and its CUDA devices."""
    facts = probe(probes.TORCH)
    if "works" not in facts:
        return [failed("torch", "torch", facts)]
    torch = Check("torch", "ok", f"{facts['version']} in {facts['folder']}")
    names = ", ".join(facts.get("devices", ()))
    if "failure" in facts:
        cuda = failed(f"CUDA{names and f' ({names})'}", "torch", facts)
    elif names:
        cuda = Check("CUDA", "ok", names)
    else:
        cuda = Check("CUDA", "note", "no device: models run on the CPU")
    return [torch, cuda]


def check_torchvision() -> list[Check]:
    """Check that torchvision matches torch; otherwise its operators do not load."""
    facts = probe(probes.TORCHVISION)
    if "failure" in facts and facts.get("missing") != "packaging":
        return [failed("torchvision", "torchvision", facts)]
    found = f"{facts['version']} in {facts['folder']}"
    if facts.get("fits", True):
        return [Check("torchvision", "ok", found)]
    found += f" requires torch{facts['needs']}, but torch is {facts['torch']}"
    return [Check("torchvision", "warning", found, mend("torchvision", facts))]


def check_detectron2() -> list[Check]:
    """Check detectron2 without a hook."""
    facts = probe(probes.DETECTRON2)
    if "works" not in facts:
        return [failed("detectron2", "detectron2", facts)]
    found = f"{probes.which_detectron2(facts['folder'])} in {facts['folder']}, "
    if "failure" in facts:
        found += f"whose compiled extension does not load: {facts['failure']}"
        return [Check("detectron2", "warning", found, mend("detectron2", facts))]
    found += "compiled" if facts["compiled"] else "not compiled (not needed here)"
    return [Check("detectron2", "ok", found)]


def check_nl_detectron() -> list[Check]:
    """Check this package and its configs."""
    facts = probe(probes.NL_DETECTRON)
    if "failure" in facts:
        checks = [failed("nl_detectron", "nl_detectron", facts)]
    else:
        checks = [Check("nl_detectron", "ok", f"{facts['version']} in {facts['folder']}")]
    zoo = runpy.run_path(str(ROOT / "nl_detectron" / "model_zoo" / "files.py"))
    names = zoo["names"]()
    yaml = sum(name.endswith(".yaml") for name in names)
    found = f"{yaml} YAML and {len(names) - yaml} Lazy configs in {zoo['CONFIGS']}"
    if names:
        checks.append(Check("model zoo", "ok", found))
    else:
        checks.append(failed("model zoo", "nl_detectron", {"failure": found}))
    return checks


def check_package(name: str, module: str, distribution: str) -> list[Check]:
    """Check that a package can be imported."""
    facts = probe(
        f"import {module}, sys, importlib.metadata as metadata\n"
        f"version = getattr(sys.modules[{module.split('.')[0]!r}], '__version__', None)\n"
        f"say(version=version or metadata.version({distribution!r}))"
    )
    if "failure" in facts:
        return [failed(name, module, facts)]
    return [Check(name, "ok", facts["version"])]


def check_setuptools() -> list[Check]:
    """Check for pkg_resources, which setuptools 82 removed."""
    (check,) = check_package("setuptools", "pkg_resources", "setuptools")
    if check.state == "ok":
        return [check]
    found = f"{check.found}; detectron2.model_zoo and LazyConfigs need it"
    return [check._replace(state="warning", found=found)]


def check_hook() -> list[Check]:
    """Check whether detectron2's own tools load this package."""
    value = os.environ.get(probes.HOOK, "")
    ours = f"export {probes.HOOK}=nl_detectron.env"
    if not value:
        found = f"not set; needed for detectron2's own tools only: `{ours}`"
        return [Check(probes.HOOK, "note", found)]
    facts = probe(probes.HOOK_IS_OURS, value)
    if facts.get("ours"):
        return [Check(probes.HOOK, "ok", value)]
    if "failure" not in facts:
        found = f"{value}, which does not call nl_detectron.env.setup_environment"
        return [Check(probes.HOOK, "warning", found, ours)]
    if "failure" in probe(probes.HOOK_IS_OURS):
        return [Check(probes.HOOK, "note", f"{value}, not tested: detectron2 is broken")]
    found = f"with {value} detectron2 cannot be imported: {' '.join(facts['failure'].split())}"
    return [Check(probes.HOOK, "error", found, ours)]


def check_data_sets() -> list[Check]:
    """Check for the annotations and images of detectron2's COCO data sets."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser().absolute()
    if not root.is_dir():
        set_wrong = "DETECTRON2_DATASETS" in os.environ
        command = "export DETECTRON2_DATASETS=FOLDER_THAT_HOLDS_coco" if set_wrong else ""
        found = f"folder {root} does not exist; custom COCO files do not need it"
        return [Check("data sets", "warning" if set_wrong else "note", found, command)]
    complete: list[str] = []
    incomplete: list[str] = []
    for name, (images, json_file) in COCO.items():
        if (root / json_file).is_file():
            folder = root / images
            has_images = folder.is_dir() and any(folder.iterdir())
            (complete if has_images else incomplete).append(name)
    found = f"{', '.join(complete) or 'none of the COCO names'} in {root}"
    if incomplete:
        found += f"; without their images: {', '.join(incomplete)}"
    return [Check("data sets", "ok" if complete else "note", found)]


CHECKS = (
    check_python,
    check_torch,
    check_torchvision,
    check_detectron2,
    check_nl_detectron,
    lambda: check_package("fvcore", "fvcore", "fvcore"),
    lambda: check_package("pycocotools", "pycocotools.mask", "pycocotools"),
    lambda: check_package("OpenCV", "cv2", "opencv-python-headless"),
    lambda: check_package("numpy", "numpy", "numpy"),
    lambda: check_package("Pillow", "PIL.Image", "pillow"),
    check_setuptools,
    check_hook,
    check_data_sets,
)


def combinations(path: Path = TESTED) -> list[dict[str, str]]:
    """Return the combinations of versions that passed the whole test suite."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def format_report(checks: list[Check]) -> str:
    """Format the checks as text."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:8} {check.name:{width}}  {check.found}")
        if check.mend:
            lines.append(f"{'':8} {'':{width}}  fix it with: {check.mend}")
    states = [check.state for check in checks]
    lines.append(f"\n{states.count('error')} errors, {states.count('warning')} warnings")
    return "\n".join(lines)


def format_matrix(rows: list[dict[str, str]]) -> str:
    """Format the combinations as a table."""
    if not rows:
        return "no combination of versions is recorded"
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = command_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="only print the versions that passed the whole test suite",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the report, and exit with 0, 1 or 2."""
    args = parse_args(argv)
    if args.matrix:
        rows = combinations()
        print(json.dumps(rows, indent=2) if args.json else format_matrix(rows))
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each check waits for its own processes
        checks = [check for found in pool.map(lambda run: run(), CHECKS) for check in found]
    if args.json:
        print(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        print(format_report(checks))
    sys.exit(max(STATES[check.state] for check in checks))
