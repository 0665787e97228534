"""The record of tested versions: written by a whole suite that passes, and by nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nl_detectron_cli import doctor
from tests.running import ROOT

CONFTEST = """
import pathlib
from tests.tested import record
def pytest_sessionfinish(session, exitstatus):
    record(session.config, exitstatus, pathlib.Path("tested.json"))
"""


@pytest.fixture
def suite(tmp_path):
    """Runs a suite of two tests that has our conftest's hook; returns what is recorded then."""
    (tmp_path / "checks").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = checks\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "checks" / "test_first.py").write_text("def test_first(): pass")
    second = "import os\ndef test_second(): assert 'FAIL' not in os.environ"
    (tmp_path / "checks" / "test_second.py").write_text(second)

    def run(*arguments, **variables):
        variables = {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", **variables}
        command = [sys.executable, "-m", "pytest", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables})
        assert done.returncode == ("FAIL" in variables)
        return doctor.combinations(tmp_path / "tested.json")

    return run


def test_whole_suite_is_recorded_once(suite, tmp_path):
    (row,) = suite()
    assert row["torch"] == torch.__version__.split("+")[0]
    assert row["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert row["detectron2"].startswith(("v0.6", "main"))
    lines = doctor.format_matrix([row]).splitlines()
    assert lines[0].split() == ["detectron2", "torch", "torchvision", "python", "platform"]
    assert " ".join(lines[1].split()) == " ".join(row.values())

    written = (tmp_path / "tested.json").read_bytes()
    assert suite("-q", "--durations=3", "-n2", "--dist=loadscope") == [row]
    assert (tmp_path / "tested.json").read_bytes() == written
    (tmp_path / "tested.json").write_text('[{"detectron2": "an older one"}]')
    assert suite() == [{"detectron2": "an older one"}, row]


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["-k", "first"], {}),
        (["-n2", "checks/test_first.py"], {}),
        ([], {"PYTEST_ADDOPTS": "--deselect=checks/test_first.py"}),
        ([], {"FAIL": "1"}),
    ],
)
def test_part_of_it_or_a_failure_is_not(suite, arguments, variables):
    assert suite(*arguments, **variables) == []


def test_a_file_that_cannot_be_written_is_no_failure(suite, tmp_path):
    (tmp_path / "tested.json").mkdir()
    assert suite() == []
