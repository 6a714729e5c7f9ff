# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# two, so that the demo does not wait for what only tests need; the second includes the first
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export WANDB_SILENT ?= true

.PHONY: demo test test-all lint docs install clean

install: $(DEV_STAMP)

# torch first and pinned: a plain `torch` brings a GPU build of several GB
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[examples]"
	touch $(STAMP)

$(DEV_STAMP): $(STAMP)
	$(PIP) --editable ".[dev]"
	touch $(DEV_STAMP)

demo: $(STAMP)
	WANDB_MODE=offline $(BIN)/python examples/digits.py

test: $(DEV_STAMP) lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" -q

# everything, the tests that take minutes included
test-all: $(DEV_STAMP) lint
	$(BIN)/python -m pytest -n $(WORKERS) -q

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lightning_slt

# into build/site; a warning is an error
docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info runs
