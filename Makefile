SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= pipeline,iqa,plugin,app,test
# ffcv is compiled on this machine, so it is taken only where what it is compiled against is there.
FFCV := $(shell pkg-config --exists opencv4 libturbojpeg 2>/dev/null && echo ,export)
ALL_EXTRAS := $(EXTRAS)$(FFCV)
BIN := .venv/bin
# Two processes of tests: most tests compute on one thread. `make test PROCESSES=0` runs them in one.
PROCESSES ?= 2
PYTEST := $(BIN)/pytest -q -n $(PROCESSES) --dist loadgroup --no-loadscope-reorder
CHECKED := iqpir pipeline jobs tests infra docs
comma := ,
# Threads that wait sleep instead of spinning: beside other work, spinning made a training step 15 times slower.
export OMP_WAIT_POLICY ?= PASSIVE
STAMP := .venv/.installed-$(subst $(comma),-,$(ALL_EXTRAS))

.PHONY: help env check static test demo format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Everything about installing goes to stderr: the last line of `make demo` on stdout is JSON.
# torch comes through pip, which finds a local CPU file where one is configured; its exact version is then a
# constraint, so that uv (which reads no pip configuration) keeps it instead of fetching the CUDA build.
$(STAMP): pyproject.toml constraints.txt
	@{ \
	echo "make: installing $(ALL_EXTRAS) into .venv; a minute or two, once"; \
	$(if $(FFCV),,echo "make: without ffcv (its tests skip): it needs pkg-config g++ libturbojpeg0-dev libopencv-dev";) \
	test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "make: Python 3.11 to 3.13 is needed: make clean env PYTHON=python3.11"; exit 1; }; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" uv==0.13.9; \
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/torch.txt; \
	$(BIN)/uv pip install --python $(BIN)/python -c .venv/torch.txt -c constraints.txt -e ".[$(ALL_EXTRAS)]"; \
	touch $@; \
	} >&2

env: $(STAMP) ## Create .venv (skipped while pyproject.toml and constraints.txt are unchanged)

static: env
	@$(BIN)/ruff format --check $(CHECKED)
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

check: static ## The loop to work in: formatting, lint, types, import contracts, fast tests
	@$(PYTEST) -m "not slow"

test: static ## Everything: the static checks and all tests
	@$(PYTEST)

demo: env ## The whole chain on sample pictures, or on yours: make demo INPUT=/a/folder
	@$(BIN)/python jobs/demo.py $(if $(INPUT),--input '$(subst ','\'',$(INPUT))')

format: env ## Rewrite the code in the one format
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

clean: ## Remove the environment and caches; workspaces and runs stay
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
