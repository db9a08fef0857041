# Every target sets up what it needs: a fresh Debian or Ubuntu with python3 and make is enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.icm-ready
# Each process of the tests computes on one core. Tests of a file share fixtures that take seconds, so they stay together.
# The files keep their order: the long ones of tests/cli begin, the many short ones of tests/registry fill the end.
JOBS    ?= 2
WORKERS ?= $(JOBS)
# What is compiled is kept, whatever the environment says: otherwise each worker, and each `python` that a test starts,
# compiles again all that it imports.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
THOROUGH := $(PYTEST) --hypothesis-profile=thorough

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rest test-pairs test-all faults test-studies test-device test-as-cuda test-as-mps lint types gpu-check format docs lock dist example-fleet domain-fleet detection-fleet classification ci clean

help:  ## list the targets
	@awk -F ':.*## ' '/^## / {printf "\n%s\n", substr($$0, 4)} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

## Try it
setup: $(READY)  ## create .venv with the locked dependencies and icm itself (about 1.4 GB; 6 GB with CUDA)

$(READY): pyproject.toml requirements.lock .ci/setup .ci/environment
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash .ci/setup
	@touch $@

demo: $(READY)  ## ingest, train, materialize, compare and measure on the CPU: first results in 2 minutes, all in 5
	@VENV="$(VENV)" bash docs/demo.sh

## Check it
test: test-device  ## run a test of each promise, command, format and kind of base model (about 8 minutes on 2 cores)
	@$(PYTEST) -m "not slow and not fault"

test-rest: $(READY)  ## run the slow tests, and property tests with more examples
	@$(THOROUGH) -m "(slow or property) and not fault"
	@$(MAKE) $(SIDE_BY_SIDE) test-as-cuda WHICH=slow $(PAIRS_LEFT)

# Few tests in processes of their own are done sooner side by side than with two workers each.
SIDE_BY_SIDE := --no-print-directory -j $(JOBS) --output-sync=target WORKERS=0

# What may differ from pair to pair: the model of a store, and what many processes do. For all of it: PAIRED=tests/registry
PAIRED ?= $(addprefix tests/registry/,test_store_model.py test_publishing.py test_eviction.py test_concurrency.py)
PAIRS_LEFT := $(addprefix pair-,sqlite+s3 postgres+folder postgres+s3)
test-pairs: $(READY)  ## run tests of the registry on other pairs of a database and a place of bytes (part of `make test-rest`)
	@$(MAKE) $(SIDE_BY_SIDE) $(PAIRS_LEFT)

.PHONY: $(PAIRS_LEFT)
$(PAIRS_LEFT): pair-%: $(READY)
	@$(PYTEST) $(PAIRED) --pair $* -m "not fault"

test-all: $(READY)  ## run `make test` and `make test-rest`
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-rest

# For example: make faults PAIRS=postgres+s3 FAULTS="--parts kills --kills 5"
PAIRS  ?= sqlite+folder sqlite+s3 postgres+folder postgres+s3
FAULTS ?=
faults: $(READY)  ## run fault campaigns: kills, cut connections, flipped bits, full disks (hours)
	@$(PYTEST) -m fault
	@for pair in $(PAIRS); do OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --pair $$pair $(FAULTS) || exit 1; done

test-studies: $(READY)  ## run the tests of the studies in tests/benchmarks
	@$(PYTEST) tests/benchmarks

# In processes of their own: the stand-in comes before torch.
WHICH ?= not slow
test-device: $(READY)  ## run the tests on a simulated GPU (half a minute; part of `make test`)
	@$(MAKE) --no-print-directory -j 2 --output-sync=target test-as-cuda test-as-mps

test-as-cuda: $(READY)
	@$(PYTEST) -p tests.device.as_cuda -m "$(WHICH)" tests/device

test-as-mps: $(READY)
	@$(PYTEST) -n 0 -p tests.device.as_mps -m "$(WHICH)" tests/device

lint: $(READY)  ## run ruff and check the formatting and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(READY)  ## run mypy --strict over the three packages
	@$(BIN)/mypy

gpu-check: $(READY)  ## run all GPU code: simulated, then on an 8B-shaped base (0.3B without a GPU)
	@$(BIN)/python -m tests.benchmarks.gpu_check

ci: lint types test  ## run lint, types and test, as .ci/run does

dist: $(READY)  ## build and check wheel and sdist in dist/, and try the wheel on Python 3.11 and 3.13
	@VENV="$(VENV)" bash .ci/dist

## Change it
format: $(READY)  ## format the code with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)  ## regenerate docs/reference and docs/compatibility.md
	@$(BIN)/python -m icm_cli.reference docs/reference
	@$(BIN)/python -m tests.compat.table docs/compatibility.md

lock: $(READY)  ## resolve requirements.lock again (torch stays out: see pyproject.toml)
	@$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/torch.txt
	@$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --unsafe-package torch --constraint $(VENV)/torch.txt \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links --no-emit-options \
		--extra dev --extra diffusion --extra parquet --extra plot --extra quantized --extra ray --extra serve --extra team --extra test --extra vision --output-file requirements.lock pyproject.toml

example-fleet: $(READY)  ## retrain the adapters in docs/example-fleet (about an hour on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.example_fleet

domain-fleet: $(READY)  ## train 52 adapters for studies, in build/domain-fleet (an hour or two on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.domain_fleet --work build/domain-fleet --fleet build/domain-fleet/fleet

detection-fleet: $(READY)  ## train detectors on composed images, in build/detection-fleet (about 20 minutes on one core)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.detection_fleet

classification: $(READY)  ## train six text classifiers and evaluate their codes (ten minutes on one core)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.classification --work build/classification

clean:  ## remove caches and the virtual environment
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info demo-out
