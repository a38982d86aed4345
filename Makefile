# Each target makes its own environment in $(VENV) and installs what it needs, once.
#   make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON = python3
VENV = .venv
PYTEST_ARGS = -n 2 --dist loadgroup --durations 10
CHECKED = tests/test_readme.py tests/test_public.py tests/test_imports.py tests/test_norms.py tests/test_rules.py
ACCELERATORS = $(VENV)-accelerators

BIN = $(VENV)/bin
# What a formula means does not depend on how well XLA compiles it, which takes a third of the time.
QUICKLY = XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS"
NBMAKE = $(BIN)/python -m pytest -W default --nbmake
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo sweep check test test-oldest test-full mutants test-clients bench accelerators
.PHONY: test-accelerators notebooks notebooks-full
.PHONY: docs dist doctest lint types format dev clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo  ## train a small model with and without bounds, draw demo.png
	$(BIN)/python -m benchmarks.demo

sweep: $(VENV)/.demo  ## train three small models under many thresholds and rules, draw sweep.png
	$(BIN)/python -m benchmarks.sweep

check: $(VENV)/.test  ## see that it works: the README's examples and the quick tests
	$(QUICKLY) $(BIN)/python -m pytest -n 2 -q -m 'not full and not more' $(CHECKED) -k 'README: or not test_code_runs'

test: $(VENV)/.test  ## run the tests of what everything means, in minutes
	$(QUICKLY) $(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not full and not more' tests/mesh
	$(QUICKLY) $(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not full and not more'

# Meshes, platforms, dtypes and trees: where one version of JAX has differed from another.
OF_JAX = $(addprefix tests/test_, $(addsuffix .py, platforms merged capped_simplex weak_types layout states norms \
    settings names frozen no_entries no_backend local landing owners counts metrics))

test-oldest: $(VENV)/.test  ## run the tests of what a version of JAX decides
	$(QUICKLY) $(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not full and not more' tests/mesh
	$(QUICKLY) $(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not full and not more' $(OF_JAX)

test-full: $(VENV)/.test  ## run the rest: more cases of each test, and what XLA makes of every transform
	$(QUICKLY) $(BIN)/python -m pytest $(PYTEST_ARGS) -m more tests/mesh
	$(QUICKLY) $(BIN)/python -m pytest $(PYTEST_ARGS) -m more
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m full tests/mesh
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m full

mutants: $(VENV)/.test  ## break the package in one line at a time, and see which test falls
	$(BIN)/python tests/mutants.py $(ARGS)

test-clients:  ## run the tests with libraries that take a transform, in .venv-clients
	@$(MAKE) --no-print-directory VENV=$(VENV)-clients $(VENV)-clients/.clients
	$(VENV)-clients/bin/python -m pytest tests/test_clients.py

bench: $(VENV)/.bench  ## measure against Optax's own transforms, draw bench.png
	$(BIN)/python -m benchmarks

# Beside the CUDA plugin JAX does not start but with this variable.
accelerators test-accelerators: export JAX_PLATFORMS = cpu

accelerators: $(ACCELERATORS)/.accelerators  ## count what is moved and sent on an H100 and TPUs, by compiling for them
	$(ACCELERATORS)/bin/python -m benchmarks --only compiled collectives

test-accelerators: $(ACCELERATORS)/.accelerators  ## hold what is compiled for them to its limits
	$(ACCELERATORS)/bin/python -m pytest $(PYTEST_ARGS) tests/test_compiled.py tests/test_compiled_mapping.py

notebooks: $(VENV)/.notebooks  ## run the notebooks in their fast setting, and leave them as they are
	NOTEBOOKS_FAST=1 $(NBMAKE) notebooks

notebooks-full: $(VENV)/.notebooks  ## run them in full and keep the outputs, a quarter of an hour
	env -u NOTEBOOKS_FAST $(NBMAKE) --overwrite --nbmake-timeout=1200 notebooks

docs: $(VENV)/.docs  ## build the guides, the reference and the notebooks as pages
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

dist: $(VENV)/.dist  ## build the sdist and the wheel, and check their metadata
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

doctest: $(VENV)/.test  ## run the examples in the docstrings
	$(BIN)/python -m pytest --doctest-modules optax_clip

lint: $(VENV)/.lint  ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.lint  ## check types
	$(BIN)/mypy

format: $(VENV)/.lint  ## fix style and format
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

dev: $(VENV)/.dev  ## install everything that a developer needs
	@echo "Ready: . $(BIN)/activate"

clean:  ## remove the environments and all that was built
	rm -rf .venv .venv-* $(VENV) $(VENV)-* build dist docs/_build docs/notebooks demo.png sweep.png bench.json bench.png constrained.png
	rm -rf .hypothesis .jax_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "optax_clip needs Python 3.11 or newer, and $(PYTHON) is:" \
	        "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

# One stamp for each dependency group of pyproject.toml.
$(VENV)/.%: pyproject.toml $(VENV)/.pip
	@echo "Installing the group '$*' into $(VENV). The first time takes a minute or two."
	$(PIP) install --editable . --group $*
	@touch $@

# These compilers have an environment of their own.
$(ACCELERATORS)/.accelerators: pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(ACCELERATORS) ACCELERATORS=none $@
