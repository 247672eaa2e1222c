# Everything runs in ./.venv and, for the Triton server, in ./.triton; both are made here.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,13))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
TRITON := .triton
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/tested.txt
CPU_TORCH ?= torch==2.13.0
SOURCES := sfd_deploy training export serving benchmarks tests

.PHONY: help demo test test-all lint types docs bench clean set-up
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

set-up: $(VENV)/ready $(TRITON)/ready  ## make .venv and .triton

$(VENV)/ready: pyproject.toml constraints/tested.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "set-up: environment in $(VENV) ($(PYTHON))"
	@date +%s > .set-up-began
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(CPU_TORCH)
	$(PIP) -e '.[cpu,trt-rtx,serve,dev]'
	@touch $@

$(TRITON)/ready: $(VENV)/ready serving/triton-requirements.txt
	@echo "set-up: Triton Inference Server in $(TRITON)"
	$(BIN)/sfd-deploy serve --install-triton $(TRITON)
	@test ! -f .set-up-began || echo $$(( $$(date +%s) - $$(cat .set-up-began) )) > $(VENV)/set-up-seconds
	@rm -f .set-up-began
	@touch $@

demo: set-up  ## the main job, end to end, on real input (about ten minutes on two cores)
	$(BIN)/sfd-deploy demo --triton $(TRITON) --set-up-seconds "$$(cat $(VENV)/set-up-seconds 2>/dev/null || echo 0)"

# Two workers of one thread each: most tests are too small for two. A file stays with one worker, for its fixtures.
PYTEST = OMP_NUM_THREADS=1 SFD_DEPLOY_TRITON=$(CURDIR)/$(TRITON) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: set-up  ## the fast suite, with coverage
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered --cov-fail-under=90

test-all: set-up  ## the fast suite and the slow tests
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=90

lint: set-up  ## ruff: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# mypy and the import contract do not see packages mapped by package-dir: give them a tree shaped like the package.
.types: $(wildcard sfd_deploy/*.py sfd_deploy/*/*.py)
	@rm -rf .types && mkdir -p .types/sfd_deploy
	@for item in sfd_deploy/*; do ln -s "$(CURDIR)/$$item" .types/$$item; done
	@for stage in training export serving; do ln -s "$(CURDIR)/$$stage" .types/sfd_deploy/$$stage; done

types: set-up .types  ## mypy --strict and the import contract
	cd .types && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p sfd_deploy
	cd .types && PYTHONPATH=. ../$(BIN)/lint-imports --config ../pyproject.toml

docs: set-up  ## docs/keys.md, from what the configs say of their keys
	$(BIN)/python -m tests.keys

bench: set-up  ## the published tables, from the latest run
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/forgetting.py

clean:  ## remove environments and caches; runs/ is kept
	rm -rf $(VENV) $(TRITON) .types .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
