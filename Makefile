# Two commands are enough: `make demo` sets everything up and trains, `make test` sets up and tests.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard kernels/*) pyproject.toml constraints.txt

.PHONY: help demo test test-gpu lint types check bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# System packages are visible so that a torch built for this machine's GPU is used where there is one.
$(VENV)/bin/python:
	$(PYTHON) -m venv --system-site-packages $(VENV)

$(STAMP): $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.20" ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[hf,dev]"
	touch $(STAMP)

demo: $(STAMP)  ## set up, then train a real model whose budget forces all three tiers
	$(BIN)/python examples/quickstart.py

test: $(STAMP) lint types  ## set up, then check style, contracts, types and run all tests
	$(BIN)/python -m pytest

lint: $(STAMP)  ## formatting, style rules and import contracts
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	PYTHONPATH= $(BIN)/lint-imports --no-cache

# Types are checked on the tree as it is installed, where planner/ is lohan_fx.planner.
types: $(STAMP)  ## mypy, strict
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -C wheel.cmake=false --upgrade --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/python -m mypy -p lohan_fx

check: lint types  ## everything but the tests

bench: $(STAMP)  ## time the native parts on this machine
	$(BIN)/python benchmarks/adam.py
	$(BIN)/python benchmarks/files.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist
