# Every target runs in .venv, an environment of the repository's own, made by `make install`.
# `make PYTHON=/path/to/python3.11 ...` names the Python that it is made from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PINS := $(wildcard requirements/*) setup.py
STAMP := $(VENV)/installed-$(shell cat $(PINS) | sha256sum | cut -c1-16)

# Two threads that spin while they wait stop each other on a busy machine; waiting passively, they do not.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

.DEFAULT_GOAL := help
.PHONY: help install demo test train-demo bench-first-light clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 28

install: $(STAMP) ## make .venv with the pinned CPU environment (3 GB, about 3 minutes); again: nothing to do

# Keyed by what is pinned: a changed pin installs again, an interrupted installation is taken up again.
$(STAMP):
	@$(PYTHON) requirements/check_machine.py
	@echo "installing the pinned environment into $(VENV) (about 3 minutes, 3 GB)"
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/installed-*
	@$(PIP) install -r requirements/cpu.txt -r requirements/dev.txt
	@$(PIP) install --no-deps -r requirements/sglang.txt
	@$(PIP) install --no-deps -e .
	@touch $@

demo: $(STAMP) ## a real target and the shipped drafter on SGLang, with and without speculation
	@$(BIN)/dspark demo

# Most of the tests' time is the start of servers, of one core each: two files at a time, with one thread each.
test: $(STAMP) ## style, types, and the tests (they launch real servers, two at a time)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Training allocates the same large tensors at every step: glibc keeps them instead of returning them.
train-demo: $(STAMP) ## train a drafter from scratch on the answers in examples/data; resumes where it was stopped
	MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 $(BIN)/dspark train-demo

bench-first-light: $(STAMP) ## measure benchmarks/results/first_light.json again
	$(BIN)/python -m benchmarks.first_light

clean: ## remove the environment and the tools' caches; checkpoints in ~/.cache/dspark stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
