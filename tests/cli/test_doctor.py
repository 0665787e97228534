"""The doctor, where something really is missing or broken."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import venv

import pytest
from detectron2.data.datasets import builtin

from nl_detectron_cli import doctor, probes
from tests.running import ROOT


@pytest.fixture
def shadow(tmp_path, monkeypatch):
    """Put files in front of what is installed."""

    def write(files):
        monkeypatch.syspath_prepend(str(tmp_path))
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


def test_where_nothing_is_installed_it_says_so(tmp_path):
    """In an empty virtual environment."""
    venv.create(tmp_path / "empty")
    command = [tmp_path / "empty" / "bin" / "python", "-m", "nl_detectron_cli", "doctor", "--json"]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    for name, module, project in [
        ("torch", "torch", "torch torchvision"),
        ("torchvision", "torch", "torch torchvision"),
        ("fvcore", "fvcore", "fvcore"),
        ("pycocotools", "pycocotools", "pycocotools"),
        ("OpenCV", "cv2", "opencv-python-headless"),
        ("Pillow", "PIL", "pillow"),
    ]:
        assert checks[name]["state"] == "error"
        assert checks[name]["found"] == f"ModuleNotFoundError: No module named '{module}'"
        assert checks[name]["mend"] == f"{command[0]} -m pip install {project}"
    for name in ("detectron2", "nl_detectron"):
        assert checks[name]["state"] == "error"
        assert "detectron2" in checks[name]["found"]
        assert checks[name]["mend"] == f"{command[0]} {ROOT}/dev/install_detectron2.py"
    assert {checks[name]["state"] for name in ("Python", "model zoo")} == {"ok"}


BROKEN = "raise ImportError('libcudart.so.0: cannot open shared object file')"
CRASHING = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
ENDING = "import os; os._exit(0)"
GONE = "from torch import nothing_of_this_name"


@pytest.mark.parametrize(
    ("file", "code", "check", "found", "mend"),
    [
        ("torch.py", BROKEN, doctor.check_torch, "ImportError: libcudart", "torch torchvision"),
        ("torch.py", ENDING, doctor.check_torch, "ended with exit code 0", "torch torchvision"),
        ("torch/__init__.py", "", doctor.check_torch, "AttributeError", "torch torchvision"),
        ("torchvision.py", GONE, doctor.check_torchvision, "cannot import", "torch torchvision"),
        ("detectron2.py", CRASHING, doctor.check_detectron2, "crashed with SIGSEGV", "detectron2"),
        ("detectron2/__init__.py", "", doctor.check_detectron2, "detectron2.engine", "detectron2"),
        ("nl_detectron.py", BROKEN, doctor.check_nl_detectron, "libcudart", "--editable"),
    ],
)
def test_broken_package(shadow, file, code, check, found, mend):
    shadow({file: code})
    first = check()[0]
    assert first.state == "error"
    assert found in first.found
    assert mend in first.mend
    if "torch" in mend:
        assert "--force-reinstall" in first.mend


def test_torchvision_for_another_torch(shadow):
    text = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\nRequires-Dist: torch (==1.0)\n"
    shadow({"torchvision-0.1.dist-info/METADATA": text})
    (check,) = doctor.check_torchvision()
    assert check.state == "warning"
    assert "requires torch==1.0, but torch is" in check.found


def test_compiled_part_that_does_not_load(shadow):
    folder = importlib.util.find_spec("detectron2").submodule_search_locations[0]
    real = f"__path__.append({folder!r})\nexec(open({folder!r} + '/__init__.py').read())"
    shadow({"detectron2/__init__.py": real, "detectron2/_C.py": "raise ImportError('undefined x')"})
    (check,) = doctor.check_detectron2()
    assert check.state == "warning"
    assert check.found.endswith("whose compiled extension does not load: ImportError: undefined x")
    assert check.mend


VCS = {"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "02b5c4e295e9900427"}}


@pytest.mark.parametrize(
    ("source", "expected"),
    [(VCS, "main 02b5c4e"), ({"url": "file:///x", "dir_info": {}}, "main")],
)
def test_which_detectron2(shadow, tmp_path, source, expected):
    info = "detectron2-0.6.dist-info"
    shadow({f"{info}/METADATA": "Name: detectron2", f"{info}/direct_url.json": json.dumps(source)})
    assert probes.which_detectron2(str(tmp_path / "detectron2")) == "v0.6"
    shadow({"detectron2/tracking/a.py": "", "other/detectron2/tracking/a.py": ""})
    assert probes.which_detectron2(str(tmp_path / "detectron2")) == expected
    # The record is not of this copy.
    assert probes.which_detectron2(str(tmp_path / "other" / "detectron2")) == "main"


@pytest.mark.parametrize(
    ("hook", "state", "found"),
    [
        (None, "note", "not set"),
        ("nl_detectron.env", "ok", "nl_detectron.env"),
        ("other_hook", "warning", "other_hook, which does not call nl_detectron.env"),
        ("no_hook", "error", "with no_hook detectron2 cannot be imported: ModuleNotFoundError"),
    ],
)
def test_hook(shadow, monkeypatch, hook, state, found):
    monkeypatch.delenv(probes.HOOK, raising=False)
    if hook:
        monkeypatch.setenv(probes.HOOK, hook)
    shadow({"other_hook.py": "def setup_environment(): pass"})
    (check,) = doctor.check_hook()
    assert check.state == state
    assert check.found.startswith(found)
    assert (check.mend == f"export {probes.HOOK}=nl_detectron.env") == (
        state in ("warning", "error")
    )


class TestDataSets:
    def test_places_are_those_of_detectron2(self):
        stock = {**builtin._PREDEFINED_SPLITS_COCO["coco"]}
        stock |= builtin._PREDEFINED_SPLITS_COCO["coco_person"]
        assert len(doctor.COCO) == 8
        assert doctor.COCO.items() <= stock.items()

    @pytest.mark.parametrize("by_variable", [False, True])
    def test_what_is_there(self, tmp_path, monkeypatch, by_variable):
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
        root = tmp_path / "datasets"
        if by_variable:
            monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
        else:
            monkeypatch.chdir(tmp_path)

        (check,) = doctor.check_data_sets()
        assert check.state == ("warning" if by_variable else "note")
        assert str(root) in check.found

        (root / "coco" / "annotations").mkdir(parents=True)
        for name in ("instances_train2017", "instances_val2017", "person_keypoints_val2017"):
            (root / "coco" / "annotations" / f"{name}.json").touch()
        (root / "coco" / "train2017").mkdir()  # empty
        (check,) = doctor.check_data_sets()
        assert check.state == "note"
        assert check.found.startswith(f"none of the COCO names in {root}; without their images: ")

        (root / "coco" / "val2017").mkdir()
        (root / "coco" / "val2017" / "1.jpg").touch()
        (check,) = doctor.check_data_sets()
        assert check.state == "ok"
        names = "coco_2017_val, keypoints_coco_2017_val"
        assert check.found == f"{names} in {root}; without their images: coco_2017_train"


def test_installer_pins_the_same_commit():
    installer = (ROOT / "dev" / "install_detectron2.py").read_text()
    repository, commit = doctor.DETECTRON2.removeprefix("git+").split("@")
    assert f'"{repository}"' in installer
    assert f'"{commit}"' in installer
