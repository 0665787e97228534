"""The hook DETECTRON2_ENV_MODULE=nl_detectron.env, for whatever is imported first.

Each case needs an interpreter that has imported neither package. They are forks of one process
that has imported only what is slow and belongs to neither.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
from detectron2.config import get_cfg

from tests.running import ROOT

HOOK = "nl_detectron.env"

FIRST = (
    "import detectron2",
    "from detectron2.config import get_cfg",
    "import detectron2.modeling",
    "import nl_detectron",
    "import nl_detectron.config",
    "from nl_detectron.env import setup_environment",
)
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
# The hook, the code, and the last line that it prints.
CASES = {
    "path": (f"{ROOT}/nl_detectron/env.py", "import detectron2" + SEE, "True True True"),
    "twice": (None, TWICE, "gaussian"),
    "twice, hook": (HOOK, TWICE, "gaussian"),
    "yaml": (None, MERGE, "KeyError: 'Non-existent config key: MODEL.NON_LOCAL'"),
    "yaml, hook": (HOOK, MERGE, "gaussian"),
    # One sentence that says what to run, for detectron2 alone.
    "missing": (
        *(None, "sys.modules['detectron2'] = None; import nl_detectron"),
        "ModuleNotFoundError: nl_detectron needs detectron2.*`nl-detectron doctor`.*",
    ),
    "broken": (
        *(None, "sys.modules['detectron2.utils'] = None; import nl_detectron"),
        "ModuleNotFoundError: (?!.*needs detectron2).*detectron2.utils.*",
    ),
}
for _first in FIRST:
    _ours = "nl_detectron" in _first  # without the hook, importing the package only registers
    CASES[_first] = (None, _first + SEE, f"False {_ours} {_ours}")
    CASES[f"{_first}, hook"] = (HOOK, _first + SEE, "True True True")

RUNNER = """
import json, os, sys
import fvcore.nn, hydra, matplotlib.pyplot, omegaconf, pycocotools.mask, torch, torchvision
assert not any(name.split(".")[0] in ("detectron2", "nl_detectron") for name in sys.modules)
for name, (hook, code, _) in json.load(sys.stdin).items():
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
    command, given = [sys.executable, "-W", "ignore", "-c", RUNNER], json.dumps(CASES)
    options = {"capture_output": True, "text": True, "check": True, "timeout": 300}
    runner = subprocess.run(command, input=given, cwd=ROOT, env=environment, **options)
    cases = runner.stdout.split("CASE ")[1:]
    return {case.splitlines()[0]: case.splitlines()[-1] for case in cases}


@pytest.mark.parametrize("case", CASES)
def test_what_is_there(case, output):
    assert re.fullmatch(CASES[case][-1], output[case])


def test_spawned_process_has_the_hook_too(monkeypatch):
    monkeypatch.setenv("DETECTRON2_ENV_MODULE", HOOK)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert "NON_LOCAL" in pool.submit(get_cfg).result().MODEL
