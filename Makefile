# Everything runs from .venv, which `make install` builds. PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install run test test-all lint types bench demo-model docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) scripts/preflight.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time takes a few minutes; sizes are in README.md)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -e '.[serve,export,dev]'
	@touch $@

install: $(STAMP)  ## build .venv with everything

run: install  ## export the demo model, start the stack, say hello, serve until Ctrl-C
	@$(BIN)/truthgpt up --hello

test: install  ## lint, types and the tests, in under 8 minutes on 2 cores
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m "not slow"

test-all: install  ## every test, the slow ones too
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest

lint: install  ## ruff
	@$(BIN)/ruff check .

types: install  ## mypy, strict
	@$(BIN)/mypy

bench: install  ## workload W through Triton against transformers: a table and benchmarks/results/
	@$(BIN)/python -m benchmarks.engine

demo-model: install  ## train the demo model again and measure it
	@$(BIN)/python -m demo.train
	@$(BIN)/python -m demo.evaluate

docs: install  ## write the pages and tables in docs/ that come from the code
	@$(BIN)/python scripts/reference.py

clean:  ## stop what runs here, remove what was built (not model_repository/)
	@test ! -x $(BIN)/truthgpt || $(BIN)/truthgpt down
	@rm -rf $(VENV) .truthgpt build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
