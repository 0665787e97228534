"""The wheel: what is in it, and that it needs nothing else of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.running import ROOT

PACKAGES = ("nl_detectron", "nl_detectron_cli")
SOURCES = [*PACKAGES, "configs", "tests", "tools", "dev", "setup.py", "pyproject.toml"]
SOURCES += ["MANIFEST.in", "README.md", "LICENSE"]
STALE = ("nl_detectron/old.py", "nl_detectron/model_zoo/configs/old.yaml")
BUILD_SDIST = (
    "import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
)


def python(*arguments, cwd, path=""):
    env = {**os.environ, "PYTHONPATH": str(path), "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    env.pop("DETECTRON2_ENV_MODULE", None)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source, folder):
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    python("-m", "pip", "wheel", *options, source, cwd=folder.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the repository, over what an earlier build has left there."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for name in STALE:
        stale = source / "build" / "lib" / name
        stale.parent.mkdir(parents=True, exist_ok=True)
        stale.touch()
    return build_wheel(source, folder / "wheels")


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder that the wheel is installed in, and that alone."""
    folder = wheel.parent.parent / "installed"
    python("-m", "pip", "install", "--no-deps", "--target", folder, wheel, cwd=wheel.parent)
    return folder


def contents(wheel):
    """The files of a wheel, without its own description."""
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def test_wheel_is_the_packages_and_the_configs(wheel):
    def files(folder):
        names = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.*"))
        return {name.as_posix() for name in names if "__pycache__" not in name.parts}

    expected = {f"nl_detectron/model_zoo/configs/{name}" for name in files("configs")}
    for package in PACKAGES:
        expected |= {f"{package}/{name}" for name in files(package)}
    assert contents(wheel) == expected
    assert "nl_detectron/py.typed" in expected


def test_source_distribution_gives_the_same_wheel(wheel):
    folder = wheel.parent.parent
    name = python("-c", BUILD_SDIST, folder, cwd=folder / "source").splitlines()[-1]
    assert contents(build_wheel(folder / name, folder / "again")) == contents(wheel)


PREDICT = """
import nl_detectron
from nl_detectron import model_zoo
from nl_detectron_cli import predict
name = "quick_schedules/mask_rcnn_R_50_NL_FPN_instant_test.yaml"
options = ["--config-file", name, "--weights", "", "--input", "image.jpg", "--output", "drawn"]
predict.main([*options, "MODEL.RPN.POST_NMS_TOPK_TEST", "20"])
print(nl_detectron.__file__, model_zoo.get_config_file(name))
"""


def test_model_zoo_and_command_of_the_wheel(installed, tmp_path):
    """A model of the zoo, with random weights, draws what it finds."""
    program = [installed / "bin" / "nl-detectron", "--version"]
    assert python(*program, cwd=tmp_path, path=installed).startswith("nl_detectron ")
    shutil.copy(ROOT / "tools" / "attention_coco.jpg", tmp_path / "image.jpg")
    printed = python("-c", PREDICT, cwd=tmp_path, path=installed)
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["image.jpg"]
    package, config = map(Path, printed.splitlines()[-1].split())
    assert package == installed / "nl_detectron" / "__init__.py"
    assert config.is_relative_to(installed / "nl_detectron" / "model_zoo" / "configs")


@pytest.mark.slow
def test_doctor_of_the_wheel_is_content(installed, tmp_path):
    report = python("-m", "nl_detectron_cli", "doctor", cwd=tmp_path, path=installed)
    assert f"in {installed / 'nl_detectron'}\n" in report
    assert f"configs in {installed / 'nl_detectron' / 'model_zoo' / 'configs'}\n" in report
    assert report.endswith("0 errors, 0 warnings\n")
