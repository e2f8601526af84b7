# Two commands set everything up: `make ask` answers a question about a picture, `make test` runs the whole suite.
# Both install into .venv with pip; a second call installs nothing unless pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SPEC := pyproject.toml constraints.txt
SOURCES := vtprune tests examples benchmarks docs/tools docs/lens.ipynb

IMAGE ?= examples/shapes.png
QUESTION ?= what does the text say ?
METHOD ?= idpruner
KEEP ?= 1/4
OVERLAY ?= kept.png
PYTEST_ARGS ?=
PORT ?= 7860
BENCH ?= pocket-llava --keep 1/4 --keep 1/9
CASES ?= 20000
CALLS ?= 5000
DEVICE ?= cpu
# Versions of transformers; "installed" is the one that `make test` runs with.
MATRIX ?= 4.57.6 5.0.0 installed

.PHONY: ask demo test test-gpu test-matrix lint type fuzz soak sbom audit format bench docs docs-serve release clean help
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

ask: $(VENV)/installed  ## install, then ask the embedded model about a picture, dense and pruned
	$(BIN)/vtprune ask $(IMAGE) "$(QUESTION)" --method $(METHOD) --keep $(KEEP) --overlay $(OVERLAY)

demo: $(VENV)/installed-demo  ## install with the demo's extras, then serve the demo on this machine
	$(BIN)/vtprune demo --port $(PORT)

test: lint type  ## install with the dev extras, lint, check types, then run the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

test-gpu: $(VENV)/installed-dev  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-matrix: $(VENV)/installed-dev  ## a part of the conformance suite under each supported transformers (MATRIX)
	.ci/matrix $(BIN)/python $(MATRIX)

lint: $(VENV)/installed-dev  ## ruff, rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

type: $(VENV)/installed-dev  ## mypy, strict
	$(BIN)/mypy

fuzz: $(VENV)/installed-dev  ## random cases against the invariants (CASES=20000), added to build/fuzz.jsonl
	@mkdir -p build
	PYTHONPATH=.:tests HF_HUB_OFFLINE=1 nice $(BIN)/python -m fuzz --cases $(CASES) --log build/fuzz.jsonl

soak: $(VENV)/installed-dev  ## thousands of calls (CALLS=5000, DEVICE=cpu): memory flat, nothing carried over
	@mkdir -p build
	PYTHONPATH=.:tests HF_HUB_OFFLINE=1 nice $(BIN)/python -m fuzz.soak --calls $(CALLS) --device $(DEVICE) --out build/soak.json

sbom: $(VENV)/installed  ## a bill of materials of what vtprune needs, CycloneDX
	$(BIN)/python .ci/sbom.py --out build/vtprune.cdx.json

audit: $(VENV)/installed  ## known vulnerabilities in what is installed; a report
	.ci/audit $(BIN)/python build/audit.json

format: $(VENV)/installed-dev  ## fix what ruff can fix
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/installed  ## time, memory and FLOPs of a model on this machine (BENCH: what `vtprune bench` is given)
	$(BIN)/vtprune bench $(BENCH)

docs: $(VENV)/installed-docs  ## build the site into build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/installed-docs  ## serve the site on this machine while writing
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

release: $(VENV)/installed-dev  ## build, try and check a release, and tag nothing (RELEASE=--tag: tag it)
	.ci/release $(BIN)/python $(RELEASE)

clean:  ## remove the environment and all caches
	rm -rf $(VENV) $(VENV)-transformers-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SPEC) | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(SPEC) | $(BIN)/python
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps lmms-eval
	@touch $@ $(VENV)/installed

$(VENV)/installed-demo: $(SPEC) | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(SPEC) | $(BIN)/python
	$(PIP) -e '.[docs]'
	@touch $@ $(VENV)/installed
