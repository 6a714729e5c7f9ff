# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export WANDB_SILENT ?= true

.PHONY: demo test test-all lint install clean

install: $(STAMP)

# torch first and pinned: a plain `torch` brings a GPU build of several GB
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	WANDB_MODE=offline $(BIN)/python examples/digits.py

test: $(STAMP) lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" -q

# everything, the tests that take minutes included
test-all: $(STAMP) lint
	$(BIN)/python -m pytest -n $(WORKERS) -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lightning_slt

clean:
	rm -rf $(VENV) build dist *.egg-info runs
