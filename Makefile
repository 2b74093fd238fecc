# make demo             phantoms, three stages, comparisons, report
# make demo DATA=folder the same on your data (a folder with datalist.json)
# make test             everything that checks the project
# make lint             ruff

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?=
OUTPUT ?= output/demo

# What programs keep between runs stays in the checkout, too: of pip, PyTorch, Matplotlib and CUDA. MLflow reports nothing.
export XDG_CACHE_HOME := $(abspath $(VENV))/cache
export MPLCONFIGDIR := $(XDG_CACHE_HOME)/matplotlib
export CUDA_CACHE_PATH := $(XDG_CACHE_HOME)/nv
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: setup demo test lint

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# torch on its own and first: what depends on it would take a build for GPUs
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python -m common demo --output "$(OUTPUT)" $(if $(DATA),--data "$(DATA)")

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
