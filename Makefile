# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check results clean

demo: $(VENV)/.demo
	$(BIN)/vitfold demo -o out/demo

test: $(VENV)/.dev check
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "vitfold needs Python 3.10 to 3.13; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# pip's output is shown: the first installation downloads PyTorch and takes minutes.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[optimize]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[all,dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) out build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
