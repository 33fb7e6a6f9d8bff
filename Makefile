# Everything is installed into .venv, at the versions in constraints.txt; running a target again installs nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Tests start hundreds of interpreters: none should compile the same modules again, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

# Two tests at a time: importing libraries and starting ranks leave half of two cores idle. A file's tests stay in one
# process, where they share runs; long files come first, so that none is left alone at the end. What depends on how long
# something takes, or on a port that others would take, has the machine to itself, as the cluster has.
SMALL_TESTS := tests/unit
CLUSTER_TESTS := tests/cluster
ALONE_TESTS := $(filter-out %/test_benchmark.py,$(sort $(wildcard tests/launch/test_*.py)))
ALONE_TESTS += $(addprefix tests/distributed/,test_together.py test_watch.py)
LONG_TESTS := tests/bad_inputs/test_tables.py $(addprefix tests/distributed/test_,engine_options.py llava_training.py vision.py)
RANKS_TESTS := $(filter-out $(LONG_TESTS) $(ALONE_TESTS) $(SMALL_TESTS)/% $(CLUSTER_TESTS)/%,$(sort $(wildcard tests/*/test_*.py)))
SIDE_BY_SIDE := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo demo-llava demo-vlbart test test-cluster test-gpu lint docs hooks bench-step bench-gathers bench-network bench-floor bench-whole-model bench-analysis bench-claims clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

demo: $(VENV)/.installed-demo  ## set up, then fine-tune a real model on two ranks, merge and evaluate it (10 minutes on 2 CPU cores)
	$(BIN)/python launch/quickstart.py

demo-llava: $(VENV)/.installed-demo-llava  ## set up, then make a LLaVA of a real vision tower and language model, and teach it to see
	$(BIN)/python launch/llava_demo.py

demo-vlbart: $(VENV)/.installed-demo-vlbart  ## set up, then train a small VL-BART on questions about pictures and adapt it three ways
	$(BIN)/python launch/vlbart_demo.py

test: lint docs  ## set up, then lint, type-check, build the documents and run every test
	@status=0; cluster="$(CLUSTER_TESTS)"; \
	if [ -z "$$CI" ] && ! $(BIN)/python -m tests.cluster --check; then cluster=; \
		trap 'echo "NOT RUN: tests/cluster, the tests on a Slurm cluster; the reason is above" >&2' EXIT; fi; \
	$(BIN)/python -m pytest --numprocesses 2 $(SMALL_TESTS) || status=$$?; \
	$(SIDE_BY_SIDE) $(LONG_TESTS) $(RANKS_TESTS) || status=$$?; \
	$(BIN)/python -m pytest $$cluster $(ALONE_TESTS) || status=$$?; \
	exit $$status

test-cluster: $(VENV)/.installed-test  ## the tests on a Slurm cluster of two nodes inside this machine (root on Debian or Ubuntu)
	$(BIN)/python -m pytest tests/cluster

# Not a part of `make test`: its checks are in tests/gpu/checks.py, which pytest does not collect by itself.
test-gpu: $(VENV)/.installed-test  ## check on this machine's GPUs what no test can see without one, and print a table; DEVICE=cpu rehearses it
	DORA_DIST_TEST_DEVICE=$(or $(DEVICE),cuda) $(BIN)/python -m tests.gpu $(ARGS)

lint: $(VENV)/.installed-test  ## ruff, mypy, the import contract and shellcheck
	@if command -v shellcheck >/dev/null; then shellcheck slurm/*.sh tools/*.sh containers/*.sh .ci/run; \
	else echo "shellcheck is not installed: shell scripts are not checked" >&2; fi
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-test  ## build the documents' site into site/; every broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

hooks: $(VENV)/.installed-test $(VENV)/.installed-hooks  ## let git run ruff, mypy, the import contract and shellcheck before each commit
	$(BIN)/pre-commit install

bench-step: $(VENV)/.installed-bench  ## time one training step against PEFT's LoRA and DoRA; ARGS="--help" for its flags
	$(BIN)/python benchmarks/step.py $(ARGS)

bench-gathers: $(VENV)/.installed-bench  ## what gathers cost the host as rank 0 of up to 1,024 pretended ranks; ARGS="--help" for its flags
	$(BIN)/python benchmarks/gathers.py $(ARGS)

bench-network: $(VENV)/.installed-bench  ## one training step over a wire of 1 and 10 Gbit/s (root on Linux); ARGS="--help" for its flags
	$(BIN)/python benchmarks/network.py $(ARGS)

bench-floor: $(VENV)/.installed-bench  ## the least that a step's gathers and products take here; ARGS="--help" for its flags
	$(BIN)/python benchmarks/floor.py $(ARGS)

bench-whole-model: $(VENV)/.installed-bench  ## load, train, save and merge a whole LLaMA-7B, with its memory; ARGS="--help" for its flags
	$(BIN)/python benchmarks/whole_model.py $(ARGS)

bench-analysis: $(VENV)/.installed-bench  ## how magnitudes and directions move under three methods; ARGS="--help" for its flags
	$(BIN)/python benchmarks/analysis.py $(ARGS)

bench-claims: $(VENV)/.installed-bench  ## LoRA, DoRA, dynamic rank, MoRA and full fine-tuning on real text, several seeds, rates chosen for each; ARGS="--help" for its flags
	$(BIN)/python benchmarks/claims.py $(ARGS)

clean:  ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info

# torch comes first and build isolation is off, so that DeepSpeed's source package is built with the pinned
# tools and against the torch it will run with.
$(VENV)/.installed-base: constraints.txt tools/system_packages.sh
	bash tools/system_packages.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed-base pyproject.toml tools/system_packages.sh
	bash tools/system_packages.sh $(PYTHON) $*
	$(PIP) --no-build-isolation --editable '.[$*]'
	touch $@

.PRECIOUS: $(VENV)/.installed-%
