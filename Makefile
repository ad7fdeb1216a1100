# `make demo` and `make test` each work alone on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.current
RUNS ?= runs

.PHONY: help env demo test test-slow lint clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

env: $(STAMP)  ## Make .venv (nothing to do when it is current)

# torch goes in first and alone: any other range would pull gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: env  ## Train a model, make it forget, audit it, and print where the report is
	$(BIN)/palimpsest demo --out $(RUNS)/demo

test: env lint  ## Everything that must pass
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: env  ## The tests that take minutes; those of rewards in control and language need the extras rl and lm
	$(BIN)/pytest -m slow

lint: env  ## Style, types and the floors of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## Remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
