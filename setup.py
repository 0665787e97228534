"""Packaging. detectron2 is not a requirement, because no index carries upstream's under that name;
`dev/install_detectron2.py` installs it (`make` runs it). constraints.txt has tested versions.
"""

import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
COMMANDS = runpy.run_path(str(HERE / "nl_detectron_cli" / "__init__.py"))
VIDEO = "av>=17,<19"
EXPORT = ["onnx", "onnxruntime", "onnxscript"]
PACKAGES = find_packages(include=["nl_detectron", "nl_detectron.*", "nl_detectron_cli"])


class BuildWithConfigs(build_py):
    """Copies the configs into a wheel, where ``nl_detectron.model_zoo`` finds them."""

    def run(self):
        """Build from scratch, because leftovers of an earlier build would get into the wheel."""
        if not self.editable_mode:
            for package in {name.split(".")[0] for name in PACKAGES}:
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "nl_detectron", "model_zoo", "configs")
            no_cache = shutil.ignore_patterns("__pycache__")
            shutil.copytree(HERE / "configs", target, ignore=no_cache)


def readme():
    """Return the long description."""
    return (HERE / "README.md").read_text(encoding="utf-8")


setup(
    name="nl_detectron",
    version=COMMANDS["version"](),
    description="Non-local neural networks as an extension of detectron2",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={"nl_detectron": ["py.typed"], "nl_detectron_cli": ["tested.json"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["nl-detectron = nl_detectron_cli:main"]},
    install_requires=[
        "torch>=2.4",  # torch.amp.is_autocast_available
        "torchvision",
        "filelock",
        "fvcore",
        "matplotlib",
        "numpy",
        "opencv-python-headless",  # cv2; opencv-python needs libGL, which servers lack
        "pillow",
        "pyyaml",
        "tqdm",
        "setuptools<81",  # detectron2.model_zoo imports pkg_resources, which 82 removed
    ],
    extras_require={
        "dev": [
            VIDEO,
            *EXPORT,
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "safetensors",
        ],
        "export": EXPORT,  # for programs in the format onnx
        "safetensors": ["safetensors"],  # for weights in files of this kind
        "video": [VIDEO],  # to decode and write videos; 19 drops Python 3.11
    },
)
