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
# bytecode is kept, also where the environment says otherwise: a hundred processes of the tests import the package
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all test-oldest test-newest lint docs install clean

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

# everything, with the long tests and the further cases that `make test` leaves out
test-all: $(DEV_STAMP) lint
	$(BIN)/python -m pytest -n $(WORKERS) -q

# the oldest versions allowed, in an environment of their own (a GPU build of torch, 3 GB, where the index has no other)
OLDEST ?= .venv-oldest
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[examples]" \
		pytest pytest-timeout pytest-xdist tensorboard mlflow-skinny hydra-core 'jsonargparse[signatures]'
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -m "not slow" -q $(OLDEST_TESTS)

# not those of what came later: FSDP2, how an epoch is resumed in its middle, wandb's reader of offline runs
OLDEST_TESTS := tests/callbacks tests/functional tests/measures tests/testing tests/test_estimate.py \
	tests/test_estimate_traps.py tests/test_config.py tests/sampling/test_engines.py \
	$(foreach name,background background_killed background_queue bad_input data data_anew data_batches \
	influence influence_failures influence_runs influence_samples loggers overhead overhead_said private_copy \
	step_state step_surroundings steps undisturbed,tests/integration/test_$(name).py)

# the newest versions there are, whatever constraints.txt says (a GPU build of torch, 5 GB, where the index has no other)
NEWEST ?= .venv-newest
test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) -m "not slow" -q

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lightning_slt

# into build/site; a warning is an error
docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info runs
