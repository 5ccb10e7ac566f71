# make train: sets up, trains on the embedded default, shows its figures.
# make test:  sets up, runs the tests; each invariant is shown once.
# make test-all: with those that take longer than ten seconds each.
# make docs:  builds the documentation into site/; a warning is an error.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WORKDIR := workdir/spots_dynconv

.PHONY: train test test-all docs torch setup
.DEFAULT_GOAL := train

train: setup
	$(BIN)/python -m experiments.train --workdir=$(WORKDIR) \
	  --flagfile=experiments/flags/spots_dynconv.flags
	$(BIN)/python -m experiments.evaluate --workdir=$(WORKDIR) --split=test

# Two processes share a machine of two cores; a file stays in one of them, so
# that its tests share what they compile. Files are taken in tests/conftest.py's
# order.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup torch
	$(PYTEST) -m 'not slow'

test-all: setup torch
	$(PYTEST)

docs: setup
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

torch:
	@$(BIN)/python -c 'import torch' 2> /dev/null || \
	  echo 'PyTorch is not installed: its tests are skipped ($(BIN)/pip install -e .[torch])'

setup: $(READY)

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
