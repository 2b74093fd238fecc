# make demo             phantoms, three stages, comparisons, report
# make demo DATA=folder the same on your data (a folder with datalist.json)
# make label STUDIES=folder  annotate its images with MONAI Label (PLAN=plan.json, PORT=8000)
# make test             everything that checks the project
# make bench            how fast everything is here, into output/bench.md; nothing else should run beside it
# make test-nnunet      imported models against nnU-Net itself, in an environment of its own
# make lint             ruff and mypy

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?=
OUTPUT ?= output/demo
LABEL  := .venv-label
NNUNET := .venv-nnunet
# Not what the environment calls HOST, which shells set to the machine's name: the server asks for no password.
HOST   := 127.0.0.1
PORT   ?= 8000

# What programs keep between runs stays in the checkout, too: of pip, PyTorch, Matplotlib and CUDA. MLflow reports nothing.
export XDG_CACHE_HOME := $(abspath $(VENV))/cache
export MPLCONFIGDIR := $(XDG_CACHE_HOME)/matplotlib
export CUDA_CACHE_PATH := $(XDG_CACHE_HOME)/nv
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: setup demo label bench test test-nnunet lint

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# torch on its own and first: what depends on it would take a build for GPUs
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python -m common demo --output "$(OUTPUT)" $(if $(DATA),--data "$(DATA)")

bench: SHELL := /bin/bash
bench: setup
	mkdir -p output
	set -o pipefail; $(BIN)/python -m benchmarks all | tee output/bench.md

label:
	@test -n "$(STUDIES)" || { echo "Name the folder of your images: make label STUDIES=folder"; exit 2; }
	@# the server asks itself by way of 127.0.0.1
	@case "$(HOST)" in 127.0.0.1|0.0.0.0) ;; *) echo "HOST is 127.0.0.1, or 0.0.0.0 for all addresses"; exit 2;; esac
	@$(MAKE) --no-print-directory $(LABEL)/.ready
	MONAI_LABEL_SESSION_PATH="$(CURDIR)/$(LABEL)/cache/sessions" $(LABEL)/bin/python -m monailabel.main start_server \
		--app monailabel_app --studies "$(STUDIES)" --host $(HOST) --port $(PORT) \
		$(if $(PLAN),--conf plan "$(PLAN)") $(if $(BUNDLES),--conf bundles "$(BUNDLES)")

# MONAI Label wants an older pydicom than we do, so it has an environment of its own.
LABEL_PIP = $(LABEL)/bin/pip install --quiet --constraint monailabel_app/constraints.txt
LABEL_FILES := $(addprefix monailabel_app/,constraints.txt requirements.txt finish_environment.py)
$(LABEL)/.ready: $(LABEL_FILES) pyproject.toml
	$(PYTHON) -m venv $(LABEL)
	$(LABEL_PIP) torch
	$(LABEL_PIP) --editable . --requirement monailabel_app/requirements.txt
	$(LABEL_PIP) --no-deps monailabel pydicom-seg torchvision
	$(LABEL)/bin/python monailabel_app/finish_environment.py
	touch $@

test: setup lint
	# where MONAI Label can't be installed, the tests of it are skipped and say so
	-$(MAKE) --no-print-directory $(LABEL)/.ready
	$(BIN)/pip check
	$(BIN)/python -m pytest -rs

test-nnunet: $(NNUNET)/.ready
	$(NNUNET)/bin/python -m pytest -rs tests/test_import_nnunet.py

$(NNUNET)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(NNUNET)
	$(NNUNET)/bin/pip install --quiet --constraint constraints.txt torch
	$(NNUNET)/bin/pip install --quiet --constraint constraints.txt --editable '.[nnunet]' pytest pytest-timeout
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
