# Every target sets itself up and works alone. PYTHON picks the interpreter for a new environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart setup fmt check test e2e bench gpu docs clean

quickstart: $(VENV)/.installed
	$(BIN)/luthier quickstart

setup: $(VENV)/.developer

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

fmt: $(VENV)/.developer
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .

check: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Some hundred processes are started: what they import is compiled once, also where nothing else is to be.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.developer
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not e2e and not gpu'

e2e: $(VENV)/.developer
	$(BIN)/python -m pytest -m e2e

gpu: $(VENV)/.developer
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/.developer
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.developer
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist
