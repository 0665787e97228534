"""Packaging. detectron2 is not named below: no index carries upstream's under that name, so
`dev/install_detectron2.py` installs it (`make` calls it). constraints.txt has tested versions.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version():
    """Read ``__version__`` as text: importing the package would need detectron2 and torch."""
    text = (HERE / "nl_detectron" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def readme():
    """The long description."""
    return (HERE / "README.md").read_text(encoding="utf-8")


setup(
    name="nl_detectron",
    version=version(),
    description="Non-local neural networks as an extension of detectron2",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["nl_detectron", "nl_detectron.*"]),
    package_data={"nl_detectron": ["py.typed"]},
    install_requires=[
        "torch>=2.4",  # torch.amp.is_autocast_available
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
        "dev": ["hypothesis", "mypy", "pytest", "ruff", "safetensors"],
        "safetensors": ["safetensors"],  # for weights in files of this kind
    },
)
