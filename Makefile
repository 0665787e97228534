# make demo         train the long-range demo and print its results
# make video        train the video demo: what C2D, I3D, TSM and non-local networks can see
# make test         lint, types and the fast tests
# make test-slow    the tests marked slow
# make torture      the slow tests of what can go wrong: random kills, flipped bits, malformed files
# make peers        compare with mmcv, pytorchvideo and timm, installed in build/peers
# make lint         ruff and mypy
# make env          create the environment
#
# Everything runs in an environment that is created on first use and then kept:
#   make test               .venv
#   make test VENV=path     another one
#   make test VENV=         the active one (`python` on the PATH)
# All three install the versions in constraints.txt. PYTHON=path chooses the interpreter for a new
# environment.

VENV = .venv
PYTHON = $(shell python3.11 -c '' 2> /dev/null && echo python3.11 || echo python3)

ifeq ($(strip $(VENV)),)
  override VENV := $(or $(shell python -c 'import sys; print(sys.prefix)'), \
    $(error VENV= asks for the active environment, but there is no python on the PATH))
endif
RUN = $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
READY = $(VENV)/.nl_detectron_ready

.PHONY: demo video test test-slow torture peers lint env clean

demo: env
	$(RUN) projects/long_range/demo.py

video: env
	$(RUN) projects/video_classification/demo.py

# Two processes of one thread each are faster than one of two threads.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n2 --dist=loadscope
test: lint
	$(PYTEST)

test-slow: env
	$(RUN) -m pytest -m slow

torture: env
	$(PYTEST) -m slow tests/torture tests/engine tests/safety

# Installed without dependencies: those that the blocks need are installed already, or listed here.
PEERS = mmcv-lite mmengine addict rich yapf pytorchvideo timm safetensors
peers: env
	$(INSTALL) --no-deps --upgrade --target build/peers $(PEERS)
	PYTHONPATH=build/peers $(RUN) -m pytest -m '' tests/test_peers.py tests/weights/test_files.py \
	    projects/video_classification/tests/test_weights.py \
	    projects/video_classification/tests/test_converted_config.py

lint: env
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

env: $(READY)

$(READY): setup.py constraints.txt dev/install_detectron2.py | $(RUN)
	$(INSTALL) torch torchvision
	$(RUN) dev/install_detectron2.py
	$(INSTALL) --editable '.[dev]'
	touch $@

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "nl_detectron needs Python 3.11 or newer: name one with PYTHON=path")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find nl_detectron nl_detectron_cli projects tests tools dev -name __pycache__ -type d -exec rm -rf {} +
