# Everything runs from .venv, which `make install` builds. PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AIPERF ?= aiperf
STAMP := $(VENV)/.installed
# A file runs in one process, so that what its tests share is made once; tests/conftest.py says how many processes there
# are and has the long files begin first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install run test test-all soak lint types bench bench-peers bench-scaling bench-gateway bench-aiperf demo-model docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) scripts/preflight.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time takes a few minutes; sizes are in README.md)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -e '.[serve,export,measure,dev]'
	@touch $@

install: $(STAMP)  ## build .venv with everything

run: install  ## export the demo model, start the stack, say hello, serve until Ctrl-C
	@$(BIN)/truthgpt up --hello

test: install  ## lint, types and the tests, in under 8 minutes on 2 cores
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -m "not slow"

test-all: install  ## every test, the slow ones too
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST)

soak: install  ## 20 minutes of mixed load: memory, files and shared memory stay flat
	@$(BIN)/python -m tests.soak --minutes 20

lint: install  ## ruff
	@$(BIN)/ruff check .

types: install  ## mypy, strict
	@$(BIN)/mypy

bench: install  ## workload W through Triton against transformers: a table and benchmarks/results/
	@$(BIN)/python -m benchmarks.engine

bench-peers: install  ## ours beside OpenVINO GenAI, llama.cpp and CTranslate2: about an hour and benchmarks/results/
	@$(BIN)/python -m benchmarks.peers --install
	@$(BIN)/python -m benchmarks.peers

bench-scaling: install  ## how a step grows with slots, context and the queue: minutes and benchmarks/results/
	@$(BIN)/python -m benchmarks.scaling

bench-gateway: install  ## what the gateway adds to a request, beside LiteLLM, Portkey and Triton: 15 minutes and benchmarks/results/
	@$(BIN)/python -m benchmarks.gateway --install-peers
	@$(BIN)/python -m benchmarks.gateway

bench-aiperf: install  ## whether `truthgpt bench` and aiperf say the same; AIPERF names its executable
	@$(BIN)/python -m benchmarks.aiperf_agreement --aiperf $(AIPERF)

demo-model: install  ## train the demo model again and measure it
	@$(BIN)/python -m demo.train
	@$(BIN)/python -m demo.evaluate

docs: install  ## write the pages and tables in docs/ that come from the code
	@$(BIN)/python scripts/reference.py

clean:  ## stop what runs here, remove what was built (not model_repository/)
	@test ! -x $(BIN)/truthgpt || $(BIN)/truthgpt down
	@rm -rf $(VENV) .truthgpt build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
