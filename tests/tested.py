"""Records the versions that the whole suite passed on, for ``nl-detectron doctor --matrix``."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
from importlib import metadata

from nl_detectron_cli import doctor
from nl_detectron_cli.probes import which_detectron2

# Options that leave out no test.
HARMLESS = re.compile(r"-[qvx]+|-n\d+|--dist=\w+|--durations=\d+|--tb=\w+")


def is_whole_suite(config):
    """Whether pytest was asked for what `make test` asks for."""
    asked = config.invocation_params
    words = [*asked.args, *os.environ.get("PYTEST_ADDOPTS", "").split()]
    part = hasattr(config, "workerinput")  # one of several processes
    return not part and asked.dir == config.rootpath and all(map(HARMLESS.fullmatch, words))


def versions():
    (folder,) = importlib.util.find_spec("detectron2").submodule_search_locations
    return {
        "detectron2": which_detectron2(folder),
        "torch": metadata.version("torch").partition("+")[0],
        "torchvision": metadata.version("torchvision").partition("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def record(config, exit_status, path=doctor.TESTED):
    """Add the combination to the file, if it is new there; a file that cannot be written stays."""
    if exit_status == 0 and is_whole_suite(config):
        known = doctor.combinations(path)
        rows = sorted([*known, versions()], key=lambda row: tuple(row.values()))
        if versions() not in known:
            with contextlib.suppress(OSError):
                path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
