# `make help` lists the targets. Everything is installed into $(VENV), and only when what it is made of changed.
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
GPU_PYTHON ?= $(shell command -v python3 || echo $(PYTHON))
ARGS   ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := dev,reference
# Compiled into the editable package when it is installed.
KERNELS := $(wildcard l4convert/quantization/native*.cpp l4convert/quantization/native*.h)

.PHONY: help venv test lint format fuzz demo plugins gpu gpu-environment clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## Create the environment: the package (editable), its reference and its tools, at pinned versions

# torch goes in first and alone: its pin is what keeps the resolver from looking at other, far larger builds.
$(STAMP): pyproject.toml setup.py constraints.txt $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# Tests of a file share what they converted, so a file stays in one process; the longest one comes first (tests/conftest.py).
test: $(STAMP) ## Run the tests (ARGS="-k name" passes options to pytest)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Rewrite the sources to the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

fuzz: $(STAMP) ## Fuzz the parsers for a minute (ARGS="config --runs 1000000" for one of them, longer)
	$(BIN)/python -m tests.fuzz.run $(or $(ARGS),--seconds 60 --jobs 2)

demo: $(STAMP) ## Convert the bundled model to INT4 and FP8, validate both, generate text
	$(BIN)/python examples/01_convert_nano_scout/run.py

plugins: $(STAMP) ## Build the library of GPU kernels and TensorRT plugins into build/plugins (no GPU needed)
	$(BIN)/l4convert plugins build --output build/plugins --cache build/plugins/cache --overwrite $(ARGS)

# A Python that has torch with CUDA, Triton and the rest already is used as it is: no network is needed then. Otherwise
# everything goes into $(VENV).
gpu: ## Check and time kernels, engines and the CUDA provider on the GPU of this machine (an error where there is none)
	@$(GPU_PYTHON) benchmarks/gpu_environment.py --probe
	@if $(GPU_PYTHON) benchmarks/gpu_environment.py --ready; \
	then PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/gpu.py $(ARGS); \
	else $(MAKE) --no-print-directory gpu-environment && $(BIN)/python benchmarks/gpu.py $(ARGS); fi

gpu-environment: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plugins,tensorrt-rtx]' 'onnxruntime-gpu[cuda,cudnn]'

clean: ## Remove caches, build products and the environment
	rm -rf $(VENV) .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis examples/*/out
