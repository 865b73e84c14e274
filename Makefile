# make demo and make test do all the set-up there is: they create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
PIP := -m pip install --quiet --disable-pip-version-check
export TOKENIZERS_PARALLELISM = false
# Processes that run tests side by side, one thread each: two torch processes with two threads each are slower.
WORKERS ?= 2

.PHONY: help demo test test-all test-oldest check lint types layers tables docs dist bench suites peers clean

help:
	@echo "make demo         merge and quantize four experts on real data, and compare (first time: trains the experts)"
	@echo "make test         make check, and all tests"
	@echo "make test-all     the same with long tests that are like others"
	@echo "make check        lint, types, layers of imports, tables that follow from the results"
	@echo "make test-oldest  the end-to-end tests on the oldest versions that pyproject.toml allows"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make dist         sdist and wheel in dist/, and a run from the wheel alone"
	@echo "make bench        build both benchmark suites and run the comparison (hours on two cores)"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev,bench,data,lm-eval]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python $(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e '.[test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/epmq demo --fetch-only
	$(BIN)/epmq demo

# The hooks of pre-commit are these four.
check: lint types layers tables

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

tables: $(VENV)/.dev
	$(BIN)/python -m benchmarks.tables --check

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Those that are left out of `test`, too.
test-all: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m ''

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) tests/pipeline/test_run.py tests/models/test_families.py tests/export

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tools/try_wheel.py dist/*.whl

suites: $(VENV)/.dev
	$(BIN)/python -m benchmarks.suites text8
	$(BIN)/python -m benchmarks.suites vision8

bench: suites
	$(BIN)/python -m benchmarks.accuracy.compare text8
	$(BIN)/python -m benchmarks.accuracy.compare vision8

peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python $(PIP) -r benchmarks/speed/peers.txt

clean:
	rm -rf $(VENV) $(OLDEST) .venv-peers dist site epmq-demo
