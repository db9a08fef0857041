# Every target sets up what it needs: a fresh Debian or Ubuntu with python3 and make is enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.icm-ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint types format docs lock example-fleet domain-fleet ci clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the locked dependencies and icm itself

$(READY): pyproject.toml requirements.lock .ci/setup
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash .ci/setup
	@touch $@

demo: $(READY)  ## the whole story on CPU: ingest, train, materialize, bill, quality
	@VENV="$(VENV)" bash docs/demo.sh

test: $(READY)  ## run the tests (without the slow and the fault-injecting ones)
	@$(BIN)/python -m pytest -q -m "not slow and not fault"

test-all: $(READY)  ## run every test
	@$(BIN)/python -m pytest -q

lint: $(READY)  ## ruff, formatting and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(READY)  ## mypy --strict over the three packages
	@$(BIN)/mypy

format: $(READY)  ## rewrite the code the way ruff wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)  ## regenerate docs/reference
	@$(BIN)/python -m icm_cli.reference docs/reference

lock: $(READY)  ## resolve requirements.lock again, against the installed torch (which itself stays out: see pyproject.toml)
	@$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/torch.txt
	@$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --unsafe-package torch --constraint $(VENV)/torch.txt \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links --no-emit-options \
		--extra dev --extra plot --extra test --output-file requirements.lock pyproject.toml

example-fleet: $(READY)  ## train the adapters in docs/example-fleet again (about an hour on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.example_fleet

domain-fleet: $(READY)  ## train a fleet of 52 text domains for studies, in build/domain-fleet (an hour or two on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.domain_fleet --work build/domain-fleet --fleet build/domain-fleet/fleet

ci: lint types test  ## what .ci/run checks

clean:  ## remove caches and the virtual environment
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info demo-out
