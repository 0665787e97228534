"""The hook DETECTRON2_ENV_MODULE=nl_detectron.env, for whatever is imported first.

Each case needs an interpreter that has imported neither package. They are forks of one process
that has imported only what is slow and belongs to neither.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from detectron2.config import get_cfg

REPOSITORY = Path(__file__).resolve().parents[1]
HOOK = "nl_detectron.env"

FIRST = {
    "detectron2": "import detectron2",
    "get_cfg": "from detectron2.config import get_cfg",
    "modeling": "import detectron2.modeling",
    "package": "import nl_detectron",
    "config": "import nl_detectron.config",
    "setup_environment": "from nl_detectron.env import setup_environment",
}
# What is then there: the node in stock get_cfg(), our builder, our head.
SEE = """
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, ROI_KEYPOINT_HEAD_REGISTRY
print(
    "NON_LOCAL" in get_cfg().MODEL,
    "build_non_local_resnet_fpn_backbone" in BACKBONE_REGISTRY,
    "NonLocalKeypointHead" in ROI_KEYPOINT_HEAD_REGISTRY,
)
"""
MERGE = """
import tempfile
from detectron2.config import get_cfg
cfg = get_cfg()
with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    file.write("MODEL: {NON_LOCAL: {PAIRWISE: gaussian}}")
    file.flush()
    cfg.merge_from_file(file.name)
print(cfg.MODEL.NON_LOCAL.PAIRWISE)
"""
TWICE = """
from nl_detectron.env import setup_environment
setup_environment()
from detectron2.config.defaults import _C
_C.MODEL.NON_LOCAL.PAIRWISE = "gaussian"
setup_environment()
print(_C.MODEL.NON_LOCAL.PAIRWISE)
"""
CASES = {}
for _name, _first in FIRST.items():
    CASES[f"{_name}, hook"] = (HOOK, _first + SEE)
    CASES[f"{_name}, no hook"] = (None, _first + SEE)
CASES["path"] = (str(REPOSITORY / "nl_detectron" / "env.py"), "import detectron2" + SEE)
CASES["twice"] = (None, TWICE)
CASES["twice, hook"] = (HOOK, TWICE)
CASES["yaml, hook"] = (HOOK, MERGE)
CASES["yaml, no hook"] = (None, MERGE)
CASES["missing"] = (None, "sys.modules['detectron2'] = None; import nl_detectron")
CASES["broken"] = (None, "sys.modules['detectron2.utils'] = None; import nl_detectron")

RUNNER = """
import json, os, sys
import fvcore.nn, hydra, matplotlib.pyplot, omegaconf, pycocotools.mask, torch, torchvision
assert not any(name.split(".")[0] in ("detectron2", "nl_detectron") for name in sys.modules)
for name, (hook, code) in json.load(sys.stdin).items():
    print("CASE", name, flush=True)
    if os.fork() == 0:
        os.dup2(1, 2)
        if hook:
            os.environ["DETECTRON2_ENV_MODULE"] = hook
        try:
            exec(code)
        except Exception as error:
            print(type(error).__name__, error, sep=": ")
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def output():
    """The last line that each case printed."""
    environment = {k: v for k, v in os.environ.items() if k != "DETECTRON2_ENV_MODULE"}
    runner = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env=environment,
        timeout=300,
    )
    cases = runner.stdout.split("CASE ")[1:]
    return {case.splitlines()[0]: case.splitlines()[-1] for case in cases}


@pytest.mark.parametrize("first", FIRST)
def test_hook(output, first):
    assert output[f"{first}, hook"] == "True True True"


@pytest.mark.parametrize("first", FIRST)
def test_without_the_hook_importing_the_package_only_registers(output, first):
    ours = "nl_detectron" in FIRST[first]
    assert output[f"{first}, no hook"] == f"False {ours} {ours}"


def test_hook_as_a_path(output):
    assert output["path"] == "True True True"


def test_second_call_keeps_what_was_set(output):
    assert output["twice"] == output["twice, hook"] == "gaussian"


def test_yaml(output):
    assert output["yaml, hook"] == "gaussian"
    assert output["yaml, no hook"] == "KeyError: 'Non-existent config key: MODEL.NON_LOCAL'"


def test_missing_detectron2_is_one_sentence_that_says_what_to_run(output):
    assert output["missing"].startswith("ModuleNotFoundError: nl_detectron needs detectron2")
    assert "`nl-detectron doctor`" in output["missing"]
    assert "needs detectron2" not in output["broken"]
    assert output["broken"].startswith("ModuleNotFoundError: ")
    assert "detectron2.utils" in output["broken"]


def test_spawned_process_has_the_hook_too(monkeypatch):
    monkeypatch.setenv("DETECTRON2_ENV_MODULE", HOOK)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert "NON_LOCAL" in pool.submit(get_cfg).result().MODEL
