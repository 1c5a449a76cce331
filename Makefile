# Two commands are enough: `make demo` sets everything up and trains, `make test` sets up and tests.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Modules are compiled as they are imported: a few of the thousands that are installed.
INSTALL := $(BIN)/python -m pip install -q --no-compile
STAMP := $(VENV)/.installed
SOURCES := $(wildcard kernels/*) pyproject.toml constraints.txt
TREE := build/typecheck
# The browser is installed beside the environment, types are checked beside style.
MAKEFLAGS += --jobs=2
# Tests of one run at a time on each core; every one of them may need 2 GB of memory.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, len(os.sched_getaffinity(0))))")

.PHONY: help demo test browser lint types tree check bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# System packages are visible so that a torch built for this machine's GPU is used where there is one.
$(VENV)/bin/python:
	$(PYTHON) -m venv --system-site-packages $(VENV)

# The torch that is there then stays: the constraints may name another version of it.
$(STAMP): $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) -c constraints.txt torch
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -c "import torch; print(f'torch=={torch.__version__}')" >> $(VENV)/constraints.txt
	$(INSTALL) "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.20" ninja
	$(INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -e ".[hf,dev,bench]"
	touch $(STAMP)

demo: $(STAMP)  ## set up, then train a real model whose budget forces all three tiers
	$(BIN)/python examples/quickstart.py

# Plans' pages are tested in a real browser, which is installed where that is possible.
browser:
	@command -v chromedriver > /dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -q \
	     && apt-get install -y -q --no-install-recommends chromium chromium-driver; } \
	|| echo "no chromedriver: tests of pages will be skipped (install chromium and chromium-driver)"

test: $(STAMP) browser lint types  ## set up, then check style, contracts, types and run all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Contracts and types are checked on the tree as it is installed, where planner/ is lohan_fx.planner.
tree: $(STAMP)
	rm -rf $(TREE)
	$(INSTALL) --no-deps --no-build-isolation -C wheel.cmake=false --target $(TREE) .

lint: tree  ## formatting, style rules and import contracts
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	cd $(TREE) && $(abspath $(BIN))/python $(CURDIR)/.ci/contracts.py

types: tree  ## mypy, strict
	MYPYPATH=$(TREE) $(BIN)/python -m mypy -p lohan_fx

check: lint types  ## everything but the tests

bench: $(STAMP)  ## time the native parts on this machine
	$(BIN)/python benchmarks/adam.py
	$(BIN)/python benchmarks/files.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist
