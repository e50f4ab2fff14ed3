# Every target sets up what it needs in .venv and remembers it by a stamp file there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
MINUTES ?= 120
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check versions versions-oldest versions-newest data train gpu train-gpu clean

demo: $(VENV)/.demo
	$(RUN) -m pipelines.emoji

# A process a core, each with one thread.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

check: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The oldest diffusers that pyproject.toml allows, and the newest there is; all else is that of $(VENV).
versions: versions-oldest versions-newest

VERSION_TESTS := tests/hooks tests/test_apply.py tests/test_refusals.py
versions-oldest: DIFFUSERS = diffusers==$(shell sed -n 's/.*"diffusers>=\(.*\)".*/\1/p' pyproject.toml)
versions-newest: DIFFUSERS = diffusers
versions-oldest versions-newest: versions-%: $(VENV)/.dev
	$(RUN) -m pip install --quiet --upgrade --no-deps --target build/$@ '$(DIFFUSERS)'
	$(RUN) -m pip install --quiet --upgrade --target build/$@ ftfy httpx
	PYTHONPATH=build/$@ $(RUN) -c 'import diffusers; print("diffusers", diffusers.__version__)'
	PYTHONPATH=build/$@ OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal $(VERSION_TESTS)

data: $(VENV)/.train
	$(RUN) -m pipelines.emoji.data

train: $(VENV)/.train
	$(RUN) -m pipelines.emoji.train --stage all --minutes $(MINUTES)

# With the packages of the interpreter at hand, which has a torch with CUDA, and those of a folder of wheels.
gpu:
	@test -n "$(OUT)" || { echo 'Where to? make gpu OUT=folder [WHEELS=folder] [PYTHON=python3]'; exit 2; }
	$(PYTHON) -m eval.bench.gpu --out "$(OUT)" $(if $(WHEELS),--wheels "$(WHEELS)") $(GPU_OPTIONS)

# Goes on where it stopped; GPU_OPTIONS='--carried folder' on another machine.
train-gpu:
	@test -n "$(OUT)" || { echo 'Where to? make train-gpu OUT=folder [WHEELS=folder] [PYTHON=python3]'; exit 2; }
	$(PYTHON) -m pipelines.emoji.gpu --out "$(OUT)" $(if $(WHEELS),--wheels "$(WHEELS)") $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) demo

# One stamp an extra: $(VENV)/.dev stands for `pip install -e .[dev]`.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.train: $(VENV)/.%: pyproject.toml constraints.txt | $(RUN)
	@echo "installing what [$*] needs into $(VENV): up to 2 GB and some minutes, the first time"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(RUN):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)
