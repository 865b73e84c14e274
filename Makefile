# make demo and make test do all the set-up there is: they create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo test check bench suites peers clean

help:
	@echo "make demo    merge and quantize four experts on real data, and compare (first time: trains the experts)"
	@echo "make test    lint, types and all tests"
	@echo "make check   lint and types only"
	@echo "make bench   build both benchmark suites and run the comparison (hours on two cores)"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench,data,lm-eval]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/epmq demo --fetch-only
	$(BIN)/epmq demo

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

suites: $(VENV)/.dev
	$(BIN)/python -m benchmarks.suites text8
	$(BIN)/python -m benchmarks.suites vision8

bench: suites
	$(BIN)/python -m benchmarks.accuracy.compare text8
	$(BIN)/python -m benchmarks.accuracy.compare vision8

peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/speed/peers.txt

clean:
	rm -rf $(VENV) .venv-peers epmq-demo
