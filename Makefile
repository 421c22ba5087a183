# make demo: the whole method on a real chat model.  make world LANGUAGE=ar: in am, ar, hi, th or vi.  make quick, make test, make test-full: tests.  make docs: the pages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed is what it was yesterday: the versions in constraints/, one file a Python version, which `make lock`
# renews. `make newest` runs the tests on the newest versions that setup.cfg allows.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/$(VERSION).txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo world quick test test-full newest lock dist lint docs check clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -1

# An installation is redone when setup.cfg changes.
$(VENV)/.installed: setup.cfg pyproject.toml $(wildcard $(CONSTRAINTS))
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else \
	  f"Python {v[0]}.{v[1]} is too old or too new: use 3.11 to 3.13, for example make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo 'installing into $(VENV): a minute or two'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint $(CONSTRAINTS) --editable .
	@touch $@

# The demo's config has new rows begin where a word aligner says.
$(VENV)/.installed-demo: $(VENV)/.installed
	$(PIP) --constraint $(CONSTRAINTS) --editable '.[align]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --constraint $(CONSTRAINTS) --editable '.[test,reference,tpu,lint]'
	@touch $@

# The text of a run in a language, which takes seconds. The same bytes each time, so a run that was stopped goes on.
# There is everyday text beside it in Thai only.
LANGUAGE ?= ar
text = $(BIN)/python examples/world/make.py $(1) runs/text/$(1) --known examples/world/known.smollm2-135m.jsonl \
  --countries 50 $(if $(filter th,$(1)),--beside examples/thai)

demo: $(VENV)/.installed-demo
	$(call text,th)
	$(BIN)/transllm run configs/demo.yaml

world: $(VENV)/.installed-demo
	$(call text,$(LANGUAGE))
	$(BIN)/transllm run configs/world.yaml language.code=$(LANGUAGE)$(if $(filter vi,$(LANGUAGE)), vocabulary.size=540)

# Configs, data, tokenizers, launch scripts, imports: no model is run.
QUICK := $(filter-out tests/test_wheel.py, $(wildcard tests/test_*.py)) tests/docs/test_site.py tests/config tests/data \
  tests/tokenizer tests/launch tests/generation/test_session.py \
  tests/commands/test_chat.py tests/hosts/test_cluster.py tests/hosts/test_strangers.py tests/training/test_flops.py

quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -q $(QUICK)

# Hundreds of small programs are compiled and each runs for milliseconds: LLVM's expensive passes cost more than they save.
# test-full compiles as users do.
FAST := XLA_FLAGS='--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'

test: $(VENV)/.installed-test
	$(FAST) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not full'

test-full: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -s tests/reliability/check_*.py

newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[test,reference,tpu]'
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile

# torch is left out: setup.cfg names its one version, and what it brings along depends on the build that pip finds.
lock: $(VENV)/.installed
	$(PIP) 'uv >=0.9'
	for version in 3.11 3.12 3.13; do \
	  $(BIN)/uv pip compile --quiet --upgrade setup.cfg --all-extras --python-version $$version \
	    --python-platform x86_64-manylinux_2_31 --no-annotate --custom-compile-command 'make lock' \
	    --output-file constraints/$$version.txt || exit 1; \
	  sed -i '/^torch==/d; /^pip==/d; /^nvidia-/d; /^cuda-/d; /^triton==/d' constraints/$$version.txt; \
	done

# The source distribution, and the wheel that is built from it, in dist/.
dist: $(VENV)/.installed
	$(PIP) 'build >=1.2' 'twine >=6'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --constraint $(CONSTRAINTS) --editable '.[docs]'
	@touch $@

# Every page is read anew and every warning is an error: a link that leads nowhere, a page that no list names.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -E -W --keep-going -n -q -b html docs build/docs
	@echo 'the pages: build/docs/index.html'

check: lint docs test

clean:
	rm -rf $(VENV) .venv-newest .cache build dist *.egg-info
