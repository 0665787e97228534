"""Packaging and the detectron2 installer; nothing here needs a network."""

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.running import ROOT


@pytest.fixture
def installer():
    path = ROOT / "dev" / "install_detectron2.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def idle_installer(installer, monkeypatch):
    """An installer that finds nothing installed and fails the test if it would run pip."""

    def pip(*arguments):
        pytest.fail(f"ran pip {arguments}")

    monkeypatch.setattr(installer, "pip", pip)
    monkeypatch.setattr(installer, "check_tools", lambda: None)
    monkeypatch.setattr(installer, "find_detectron2", lambda: (None, "not there"))
    return installer


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def shadow(tmp_path, monkeypatch):
    """Makes processes import these files instead of what is installed."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda files: write(tmp_path, files)


# --- the plan


@pytest.mark.parametrize("source", ["index", "upstream"])
def test_dry_run_names_what_is_then_asked_of_pip(source, idle_installer, monkeypatch, capsys):
    monkeypatch.setattr(idle_installer, "git_error", lambda: "")
    idle_installer.main(["--source", source, "--dry-run"])
    plan = capsys.readouterr().out
    asked = []

    def pip(*arguments):
        if arguments[0] == "download":
            asked.extend(Path(arguments[-1]).read_text().split())
        elif "--force-reinstall" in arguments:
            asked.append(arguments[-1])
        else:
            return
        raise idle_installer.InstallError

    monkeypatch.setattr(idle_installer, "pip", pip)
    with pytest.raises(idle_installer.InstallError):
        idle_installer.main(["--source", source])
    assert len(asked) == {"index": 2, "upstream": 1}[source]  # index: a version and its hash
    for word in asked:
        assert word.rpartition("sha256:")[2] in plan


def test_auto_takes_index_and_says_why_when_git_host_is_out_of_reach(
    idle_installer, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", "")
    idle_installer.main(["--dry-run"])
    out = capsys.readouterr().out
    assert "cannot be read (git is not installed)" in out
    assert "pb1-detectron2" in out
    with pytest.raises(idle_installer.InstallError, match="--source index"):
        idle_installer.main(["--source", "upstream", "--dry-run"])
    with pytest.raises(SystemExit):
        idle_installer.main(["--source", "elsewhere"])
    assert "'elsewhere'" in capsys.readouterr().err


def test_auto_keeps_a_working_detectron2(idle_installer, monkeypatch, capsys):
    found = {"newer": True, "compiled": True, "folder": "here"}
    monkeypatch.setattr(idle_installer, "find_detectron2", lambda: (found, ""))
    idle_installer.main([])
    assert capsys.readouterr().out.startswith("kept: detectron2 (newer than the tag v0.6, with")


def test_missing_torch_or_pip_is_one_sentence_and_a_failure(installer, shadow):
    shadow({"torch.py": "raise ImportError('no torch today')"})
    command = [sys.executable, str(ROOT / "dev" / "install_detectron2.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch and torchvision must be installed first" in done.stderr
    assert "no torch today" in done.stderr
    assert "Traceback" not in done.stderr
    shadow({"pip.py": "raise ImportError('no pip today')"})
    with pytest.raises(installer.InstallError, match="has no pip"):
        installer.check_tools()


# --- the source


@pytest.mark.parametrize("text", ["", "np.int\n", "np.int\n" * 3])
def test_edit_changes_whole_words_or_fails_with_the_name_of_the_file(installer, tmp_path, text):
    write(tmp_path, {"a.py": "x = np.int\ny = np.int64 + np.int_ + snp.int\nz = np.int\n"})
    installer.apply_edit(tmp_path, installer.Edit("a.py", "np.int", "int", 2))
    assert (tmp_path / "a.py").read_text() == "x = int\ny = np.int64 + np.int_ + snp.int\nz = int\n"
    write(tmp_path, {"a.py": text})
    with pytest.raises(installer.InstallError, match=r"a\.py: expected 'np\.int' 2 times"):
        installer.apply_edit(tmp_path, installer.Edit("a.py", "np.int", "int", 2))
    assert (tmp_path / "a.py").read_text() == text


def test_guarded_import_gives_none_without_the_compiled_part(installer):
    scope = {}
    exec(installer.TRY_IMPORT_C.replace("detectron2", "json"), scope)
    assert scope["_C"] is None


def test_upload_with_another_hash_is_refused(installer, tmp_path, monkeypatch, capfd):
    write(tmp_path, {"setup.py": "raise SystemExit('an unverified setup.py was run')"})
    index = tmp_path / "index"
    index.mkdir()
    with tarfile.open(index / "pb1-detectron2-0.6.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "setup.py", "pb1-detectron2-0.6/setup.py")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(installer.InstallError, match="`pip download` failed"):
        installer.fetch_index_source(target)
    output = capfd.readouterr()
    assert "DO NOT MATCH THE HASHES" in output.err
    assert "unverified" not in output.out + output.err


# --- the probe


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_probe_tells_tag_from_newer_and_compiled_from_pure(
    installer, tmp_path, shadow, newer, compiled
):
    shadow({"torch.py": "", "detectron2/__init__.py": "__version__ = '0.6'"})
    shadow({"detectron2/tracking/__init__.py": ""} if newer else {})
    shadow({"detectron2/_C.py": ""} if compiled else {})
    found = json.loads(installer.run_python(installer.PROBE).stdout)
    assert found == {"newer": newer, "compiled": compiled, "folder": str(tmp_path / "detectron2")}
    words = installer.describe(found)
    assert ("newer than" in words) == newer
    assert ("without its compiled extension" in words) != compiled


@pytest.mark.slow
def test_detectron2_of_this_environment_works(installer):
    found, reason = installer.find_detectron2()
    assert found, reason


def test_broken_detectron2_is_not_taken_for_a_working_one(installer, shadow):
    shadow({"detectron2.py": "raise AttributeError('np.bool is gone')"})
    found, why_not = installer.find_detectron2()
    assert found is None
    assert why_not == "AttributeError: np.bool is gone"


# --- packaging


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """What setup.py declares, read where importing torch or detectron2 fails."""
    folder = tmp_path_factory.mktemp("no_torch")
    write(folder, dict.fromkeys(("torch.py", "detectron2.py"), "raise ImportError"))
    code = (
        "import json, setuptools; from distutils.core import run_setup\n"
        "d = run_setup('setup.py', stop_after='init')\n"
        "print(json.dumps([d.metadata.version, d.packages, d.install_requires, d.extras_require,"
        " d.python_requires]))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    keys = ("version", "packages", "install_requires", "extras_require", "python_requires")
    return dict(zip(keys, json.loads(done.stdout)))


def names(requirements):
    """Project names of requirement strings, in the one spelling that indexes compare."""
    found = (re.match(r"[\w.-]+", requirement).group() for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def test_setup_needs_neither_torch_nor_detectron2_to_run(metadata):
    import nl_detectron

    assert metadata["version"] == nl_detectron.__version__
    tops = {package.split(".")[0] for package in metadata["packages"]}
    assert tops == {"nl_detectron", "nl_detectron_cli"}


def test_every_import_of_the_package_is_asked_for(metadata):
    imported = set()
    for file in (ROOT / "nl_detectron").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    asked = names(metadata["install_requires"])
    projects = {"PIL": "pillow", "yaml": "pyyaml", "cv2": "opencv-python-headless"}
    imported = {projects.get(name, name) for name in imported}
    # detectron2 comes from the installer.
    assert "detectron2" not in asked
    assert imported - sys.stdlib_module_names - {"nl_detectron", "detectron2"} <= asked


def test_every_direct_dependency_is_pinned_once(installer, metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert len(names(pins)) == len(pins)
    block = re.search(r"install_requires=\[(.*?)\]", installer.SETUP, re.DOTALL).group(1)
    needed = metadata["install_requires"] + metadata["extras_require"]["dev"]
    needed += re.findall(r'"(.+?)"', block) + ["torch", "torchvision"]
    assert names(needed) <= names(pins)


def test_python_is_the_oldest_that_all_pinned_versions_take(metadata):
    """By what the installed ones of them declare."""
    minors = range(5, 30)
    constraints = (ROOT / "constraints.txt").read_text()
    for name, version in re.findall(r"^([\w.-]+)==(.+)$", constraints, re.MULTILINE):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package = importlib.metadata.metadata(name)
            if package["Version"] == version and "Requires-Python" in package:
                allowed = SpecifierSet(package["Requires-Python"])
                minors = [minor for minor in minors if f"3.{minor}.99" in allowed]
    oldest = min(minors)
    assert metadata["python_requires"] == f">=3.{oldest}"
    assert f'target-version = "py3{oldest}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nPython 3.{oldest}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_make_names_the_python_that_it_needs(tmp_path):
    older = tmp_path / "python"
    older.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 10)\n"
        'exec(sys.argv[1])\' "$2"\n'
    )
    older.chmod(0o755)
    command = ["make", "env", f"VENV={tmp_path / 'venv'}", f"PYTHON={older}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nl_detectron needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("target", ["lint", "test", "demo"])
def test_make_fails_when_a_command_fails(target, tmp_path):
    ready = tmp_path / "ready"
    ready.touch()
    command = ["make", target, "RUN=/bin/false", f"READY={ready}"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode != 0
