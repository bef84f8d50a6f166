# One door to everything: `make help`. Needs Python >= 3.11 and make; the libraries go into .venv.

PYTHON ?= python3
PIP_FLAGS ?= --quiet
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test bench check lint types imports spelling licences audit tensorboard clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  \1\t\2/' | expand -t 16
	@echo 'Options: ARGS="..." (passed on), PYTHON=python3.12 (interpreter of a new .venv), PIP_FLAGS= (show what pip does)'

train: $(VENV)/.installed-train  ## Train a router: make train ARGS="--help"
	$(BIN)/python train_rl.py $(ARGS)

test: $(VENV)/.installed-test  ## Run the tests: make test ARGS="-k kernels"
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.installed-bench  ## Measure speed on this CPU: make bench ARGS="--only experts"
	$(BIN)/python -m benchmarks.run $(ARGS)

check: lint types imports spelling licences audit  ## Everything that reads the code without running it

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

spelling: $(VENV)/.installed-dev
	$(BIN)/codespell

licences: $(VENV)/.installed-dev
	$(BIN)/pip-licenses --summary --partial-match --fail-on GPL --ignore-packages codespell

audit: $(VENV)/.installed-dev
	$(BIN)/pip-audit --local --progress-spinner off

tensorboard: $(VENV)/.installed-train  ## Look at runs/ in a browser
	$(BIN)/tensorboard --logdir runs $(ARGS)

clean:  ## Remove caches and build outputs; keeps runs/ and .venv/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# venv writes pip last: an interrupted one is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "PYTHON must be Python >= 3.11, got $(PYTHON) ($$($(PYTHON) --version 2>&1)); try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo 'creating $(VENV) with $(PYTHON) ...'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-train: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-bench: EXTRAS := [bench]
$(VENV)/.installed-dev: EXTRAS := [dev]
$(VENV)/.installed-train $(VENV)/.installed-test $(VENV)/.installed-bench $(VENV)/.installed-dev: setup.cfg constraints.txt | $(BIN)/pip
	@echo 'installing routegym$(EXTRAS) and its libraries into $(VENV) (minutes the first time, then not again) ...'
	@$(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	@touch $@
