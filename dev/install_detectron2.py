"""Install detectron2 for the Python that runs this file.

A working detectron2 is kept. Otherwise upstream's pinned commit is built from its git repository.
If no git host is reachable, the package index's copy of the tag v0.6 is installed instead. It lacks
the compiled extension, which is not needed here (RoIAlign and NMS are torchvision's); EDITS lists
every change that makes it run with current numpy, Pillow and torch. Requires torch, torchvision and
pip; uses the standard library only.

    python dev/install_detectron2.py [--source auto|upstream|index] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
SDIST = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
GIT_TIMEOUT = 15  # seconds


class InstallError(Exception):
    """A message for the user that says what is wrong and what to do."""


class Edit(NamedTuple):
    """Replace the whole words ``old`` by ``new`` in ``path``, exactly ``times`` times."""

    path: str
    old: str
    new: str
    times: int


IMPORT_C = "from detectron2 import _C"
TRY_IMPORT_C = f"try:\n    {IMPORT_C}\nexcept ImportError:\n    _C = None"
END_OF_EVAL = '"COCOeval_opt.accumulate() finished in {:0.2f} seconds.".format(toc - tic))'
PLAIN_EVAL = "if _C is None:\n    COCOeval_opt = COCOeval"

EDITS = (
    # The compiled extension is optional.
    Edit("layers/deform_conv.py", IMPORT_C, TRY_IMPORT_C, 1),
    Edit("layers/roi_align_rotated.py", IMPORT_C, TRY_IMPORT_C, 1),
    Edit("layers/rotated_boxes.py", IMPORT_C, TRY_IMPORT_C, 1),
    Edit("evaluation/fast_eval_api.py", IMPORT_C, TRY_IMPORT_C, 1),
    # Without it, pycocotools replaces the faster evaluation.
    Edit("evaluation/fast_eval_api.py", END_OF_EVAL, f"{END_OF_EVAL}\n\n\n{PLAIN_EVAL}", 1),
    # So is caffe2, which torch no longer includes.
    Edit(
        "export/__init__.py",
        "from .api import *",
        "try:\n    from .api import *\nexcept ImportError:\n    pass",
        1,
    ),
    # numpy 1.24 removed its aliases of builtin types.
    Edit("data/build.py", "np.int", "int", 2),
    Edit("data/datasets/pascal_voc.py", "np.str", "str", 1),
    Edit("evaluation/pascal_voc_evaluation.py", "np.bool", "bool", 2),
    Edit("evaluation/sem_seg_evaluation.py", "np.int", "int", 2),
    Edit("evaluation/sem_seg_evaluation.py", "np.float", "float", 5),
    Edit("structures/masks.py", "np.bool", "bool", 3),
    Edit("utils/video_visualizer.py", "np.bool", "bool", 1),
    Edit("utils/visualizer.py", "np.bool", "bool", 3),
    # Pillow 10 removed the old name.
    Edit("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", 1),
)

# Replaces the sdist's setup.py, which requires C++ sources that the sdist does not contain.
SETUP = """\
from setuptools import find_packages, setup

PROJECTS = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}
setup(
    name="detectron2",
    version="0.6",
    description="detectron2's tag v0.6 without its compiled extension",
    url="https://github.com/facebookresearch/detectron2",
    license="Apache-2.0",
    packages=find_packages(exclude=("configs", "tests*")) + list(PROJECTS),
    package_dir=PROJECTS,
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    install_requires=[
        "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8",
        "tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.1.10", "omegaconf>=2.1,<2.4", "hydra-core>=1.1", "black", "packaging",
        "setuptools<81",
    ],
)
"""

# detectron2.tracking is newer than the tag v0.6; __version__ is "0.6" either way.
PROBE = """
import json, pathlib, detectron2
from importlib.util import find_spec
try:
    import torch, detectron2._C
    compiled = True
except ImportError:
    compiled = False
newer = find_spec("detectron2.tracking") is not None
folder = str(pathlib.Path(detectron2.__file__).parent)
print(json.dumps({"newer": newer, "compiled": compiled, "folder": folder}))
"""

CHECK = """
import torch
from detectron2 import model_zoo
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ROIAlign, batched_nms
from detectron2.modeling import build_model
boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.1]])
rois = torch.cat([torch.zeros(2, 1), boxes], dim=1)
assert ROIAlign((2, 2), 1.0, 0)(torch.ones(1, 1, 8, 8), rois).shape == (2, 1, 2, 2)
assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.zeros(2), 0.5).tolist() == [0]
cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18,
                     "MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
build_model(cfg)
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a new process, in an empty folder and without detectron2's hook."""
    env = {k: v for k, v in os.environ.items() if k != "DETECTRON2_ENV_MODULE"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    with tempfile.TemporaryDirectory() as empty:
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)


def last_line(text: str) -> str:
    """Return the last non-empty line; in a traceback, this is the error."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def find_detectron2() -> tuple[dict | None, str]:
    """Return the detectron2 of this environment, or None and the reason why it does not work."""
    done = run_python(PROBE + CHECK)
    if done.returncode:
        return None, last_line(done.stderr)
    return json.loads(last_line(done.stdout)), ""


def describe(found: dict) -> str:
    """Describe the detectron2 that was found."""
    age = "newer than the tag v0.6" if found["newer"] else "the tag v0.6"
    part = "with" if found["compiled"] else "without"
    return f"detectron2 ({age}, {part} its compiled extension detectron2._C) in {found['folder']}"


def check_tools() -> None:
    """Raise if pip, torch or torchvision is missing."""
    if run_python("import pip").returncode:
        raise InstallError(
            f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip` first."
        )
    done = run_python("import torch, torchvision; torchvision.ops.nms")
    if done.returncode:
        raise InstallError(
            "torch and torchvision must be installed first, as a matching pair: "
            f"`{sys.executable} -m pip install -c {CONSTRAINTS} torch torchvision` "
            f"(import error: {last_line(done.stderr)})."
        )


def git_error() -> str:
    """Return why upstream's repository cannot be read, or an empty string."""
    if shutil.which("git") is None:
        return "git is not installed"
    command = ["git", "ls-remote", "--quiet", REPOSITORY, "HEAD"]
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=GIT_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no answer in {GIT_TIMEOUT} seconds"
    return last_line(done.stderr) if done.returncode else ""


def pip(*arguments: str | Path) -> None:
    """Run this Python's pip; raise if it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    print("+ pip", *arguments, flush=True)
    if subprocess.run(command).returncode:
        raise InstallError(f"`pip {arguments[0]}` failed; see its output above.")


def apply_edit(package: Path, edit: Edit) -> None:
    """Apply ``edit`` to ``package``; raise if the text occurs another number of times."""
    file = package / edit.path
    text = file.read_text(encoding="utf-8")
    new_text, times = re.subn(rf"(?<!\w){re.escape(edit.old)}(?!\w)", lambda _: edit.new, text)
    if times != edit.times:
        raise InstallError(
            f"{file}: expected {edit.old!r} {edit.times} times, found it {times} times; "
            "the edit does not apply to this source."
        )
    file.write_text(new_text, encoding="utf-8")


def fetch_index_source(folder: Path) -> Path:
    """Download the index's sdist, verify its hash, unpack it and apply the edits."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SDIST} --hash=sha256:{SHA256}\n")
    options = ("--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--require-hashes")
    try:
        pip("download", *options, "--dest", folder, "--requirement", requirement)
    except InstallError as error:
        raise InstallError(
            f"{error} If it mentions direct URL dependencies: an unused extra of this sdist has "
            "one, which pip 26.3 rejects; use `pip<26.3`."
        ) from error
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)  # safe, because the hash was verified
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    for edit in EDITS:
        apply_edit(source / "detectron2", edit)
    (source / "setup.py").write_text(SETUP, encoding="utf-8")
    return source


def install(source: str) -> None:
    """Build and install ``source``, then its dependencies, and OpenCV if it is missing."""
    pip("install", "--constraint", CONSTRAINTS, "setuptools<81", "wheel", "ninja")
    with tempfile.TemporaryDirectory() as folder:
        if source == "index":
            code: str | Path = fetch_index_source(Path(folder))
        else:
            code = f"git+{REPOSITORY}@{COMMIT}"
        # Both sources have the same version: without force, pip would keep what is installed, and
        # its cache may hold a build for another torch.
        options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--force-reinstall")
        pip("install", *options, code)
    needs = ["setuptools<81"]  # detectron2.model_zoo imports pkg_resources, removed in 82
    if run_python("import cv2").returncode:
        needs.append("opencv-python-headless")  # opencv-python needs libGL
    listed = run_python(
        "import importlib.metadata as m; print(*m.requires('detectron2'), sep='\\n')"
    )
    needs += listed.stdout.splitlines()
    pip("install", "--constraint", CONSTRAINTS, *needs)


def choose_source(requested: str) -> str:
    """Resolve ``auto``, and print why upstream is not used."""
    error = "" if requested == "index" else git_error()
    if not error:
        return "upstream" if requested == "auto" else requested
    if requested == "upstream":
        raise InstallError(f"{REPOSITORY} cannot be read ({error}); try --source index.")
    print(f"{REPOSITORY} cannot be read ({error}); using the package index's copy of v0.6.")
    return "index"


def plan(source: str) -> str:
    """Describe what ``install`` would do."""
    if source == "upstream":
        return f"would build and install git+{REPOSITORY}@{COMMIT}"
    lines = [f"would download {SDIST} (sha256 {SHA256}) and install it as detectron2 0.6 after:"]
    lines += [f"  {e.path}: {e.old!r} -> {e.new!r} ({e.times} times)" for e in EDITS]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Keep a working detectron2, or plan or run the installation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        choices=("auto", "upstream", "index"),
        default="auto",
        help="auto keeps a working detectron2, the others replace it (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")
    args = parser.parse_args(argv)
    check_tools()
    if args.source == "auto":
        found, reason = find_detectron2()
        if found:
            print("kept:", describe(found))
            return
        print(f"no working detectron2 here ({reason}).")
    source = choose_source(args.source)
    if args.dry_run:
        print(plan(source))
        return
    install(source)
    found, reason = find_detectron2()
    if not found:
        raise InstallError(f"detectron2 was installed but does not work: {reason}")
    print("installed:", describe(found))


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"install_detectron2: {error}")
