# make demo             phantoms, three stages, comparisons, report
# make demo DATA=folder the same on your data (a folder with datalist.json)
# make test             everything that checks the project
# make lint             ruff

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?=
OUTPUT ?= output/demo

.PHONY: setup demo test lint

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# torch on its own and first: what depends on it would take a build for GPUs
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python -m common demo --output $(OUTPUT) $(if $(DATA),--data $(DATA))

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
