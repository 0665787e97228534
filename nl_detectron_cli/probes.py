"""Probe the installation in separate processes, so that a crash does not affect this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HOOK = "DETECTRON2_ENV_MODULE"
TIMEOUT = 300  # seconds

_RUN = """
import json, sys
def say(**facts):
    print("\\nprobe:", json.dumps(facts), flush=True)
try:
    exec(sys.argv[1])
except BaseException as error:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    say(failure=f"{type(error).__name__}: {error}", missing=missing)
else:
    say(done=True)
"""

TORCH = """
import torch
say(version=torch.__version__, folder=torch.__path__[0])
torch.ones(2) @ torch.ones(2)
say(works=True)
say(devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
for device in range(torch.cuda.device_count()):
    torch.ones(2, device=device).sum().item()
"""

TORCHVISION = """
import torch, torchvision
say(version=torchvision.__version__, folder=torchvision.__path__[0], torch=torch.__version__)
boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
torchvision.ops.nms(boxes, torch.ones(1), 0.5)
torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), [boxes], 2)
from importlib.metadata import requires
from packaging.requirements import Requirement
for requirement in map(Requirement, requires("torchvision") or ()):
    if requirement.name == "torch":
        fits = requirement.specifier.contains(torch.__version__, prereleases=True)
        say(needs=str(requirement.specifier), fits=fits)
"""

# Import everything that training needs, and call what breaks in the tag v0.6 with current numpy,
# Pillow or torch. Load the compiled extension last, because it can crash the process.
DETECTRON2 = """
import detectron2
say(folder=detectron2.__path__[0])
import numpy, torch
import detectron2.engine, detectron2.evaluation, detectron2.modeling
from detectron2.layers import ROIAlign, batched_nms
from detectron2.structures.masks import polygons_to_bitmask
boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
batched_nms(boxes, torch.ones(1), torch.zeros(1), 0.5)
ROIAlign((2, 2), 1.0, 0)(torch.ones(1, 1, 8, 8), torch.cat([torch.zeros(1, 1), boxes], dim=1))
polygons_to_bitmask([numpy.array([0.0, 0.0, 4.0, 0.0, 4.0, 4.0])], 8, 8)
say(works=True)
from importlib.util import find_spec
say(compiled=find_spec("detectron2._C") is not None)
if find_spec("detectron2._C"):
    import detectron2._C
"""

NL_DETECTRON = """
import nl_detectron
say(version=nl_detectron.__version__, folder=nl_detectron.__path__[0])
"""

HOOK_IS_OURS = """
from detectron2.config import get_cfg
say(ours="NON_LOCAL" in get_cfg().MODEL)
"""


def probe(code: str, hook: str = "") -> dict[str, Any]:
    """Run Python code in a separate process with the same import path.

    Args:
        code: calls ``say(name=value)`` to report facts.
        hook: value of ``DETECTRON2_ENV_MODULE``.

    Returns:
        The reported facts. If an exception ended the code, ``failure`` describes it, and
        ``missing`` names the module that was not found, if any.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    env = {**os.environ, "PYTHONPATH": path, HOOK: hook}
    command = [sys.executable, "-P", "-W", "ignore", "-c", _RUN, code]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer within {TIMEOUT} seconds"}
    facts: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("probe: "):
            facts |= json.loads(line.removeprefix("probe: "))
    if done.returncode < 0:
        facts["failure"] = f"crashed with {signal.Signals(-done.returncode).name}"
    elif not {"done", "failure"} & facts.keys():
        facts["failure"] = f"ended with exit code {done.returncode}"
    return facts


def which_detectron2(folder: str) -> str:
    """Return the version of the detectron2 in a folder; ``__version__`` is always "0.6"."""
    if not Path(folder, "tracking").is_dir():  # only in later commits
        return "v0.6"
    for distribution in metadata.distributions(name="detectron2"):
        if Path(str(distribution.locate_file("detectron2"))).resolve() == Path(folder).resolve():
            source = json.loads(distribution.read_text("direct_url.json") or "{}")
            commit = source.get("vcs_info", {}).get("commit_id", "")
            return f"main {commit[:7]}" if commit else "main"
    return "main"
