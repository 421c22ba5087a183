# make demo: the whole method on a real chat model.  make test: the tests.  make test-reliability: minutes of kills.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-reliability lint check clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -1

# An installation is redone when setup.cfg changes.
$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else \
	  f"Python {v[0]}.{v[1]} is too old or too new: use 3.11 to 3.13, for example make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo 'installing into $(VENV): a minute or two'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,reference,tpu,lint]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/transllm run configs/demo.yaml

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-reliability: $(VENV)/.installed-test
	$(BIN)/python -m pytest -s tests/test_reliability.py tests/reliability/check_*.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf $(VENV) .cache build *.egg-info
