# `make demo` and `make test` each start from nothing: they make .venv, install the pinned versions, and run.
PYTHON ?= python3
ARGS ?=

# One thread a worker: two pytest workers with all threads each would fight for the cores.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: bench bench-scaling demo dist docs fuzz test test-slow test-cuda test-oldest lint clean

demo: .venv/.installed
	.venv/bin/python examples/plot_mislabelled_digits.py

test: lint
	$(call PYTEST,.venv) $(ARGS)

lint: .venv/.installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

test-slow: .venv/.installed
	$(call PYTEST,.venv) -m slow $(ARGS)

# The pages, with the examples run, in docs/_build/html: whatever is amiss, a broken reference among it, ends in an error.
docs: .venv/.docs
	OMP_NUM_THREADS=1 .venv/bin/python -m sphinx -n -W --keep-going docs docs/_build/html $(ARGS)

# Random cases, each in the plain way and in others, some 20,000 runs; what fails is listed once a kind, with the case to
# build again.
FUZZ ?= 2720
SEED ?= 0
JOBS ?= 2
fuzz: .venv/.installed
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 .venv/bin/python -W ignore -m fuzz.sweep $(FUZZ) $(SEED) --jobs $(JOBS) $(ARGS)

# On the interpreter at hand, with whatever torch it has: a GPU machine often brings its own.
test-cuda:
	$(PYTHON) -m pytest tests -m cuda -p no:cacheprovider $(ARGS)

# In an environment of its own: the peers' pins are not skinvert's.
BENCH = PYTHONPATH=. OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 .venv-bench/bin/python docs/benchmarks
bench: .venv-bench/.installed
	$(BENCH)/peers.py --work W1 W2 W3 $(ARGS)

bench-scaling: .venv-bench/.installed
	$(BENCH)/scaling.py $(ARGS)
	$(BENCH)/scaling.py --stream

test-oldest: .venv-oldest/.installed
	$(call PYTEST,.venv-oldest) $(ARGS)

# torch comes first and alone, spelt with its exact version, so that a wheel at hand is taken as it is.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	.venv/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

.venv/.docs: .venv/.installed
	.venv/bin/python -m pip install -c constraints.txt -e '.[docs]'
	touch $@

# Wheel and sdist, each installed alone into an environment of its own; the smoke test sees none of the sources.
dist: .venv-build/.installed
	rm -rf dist .venv-dist
	.venv-build/bin/python -m build
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	for file in dist/*.whl dist/*.tar.gz; do \
		.venv-dist/bin/python -m pip uninstall -y skinvert && \
		.venv-dist/bin/python -m pip install -c constraints.txt "$$file[persistence]" && \
		.venv-dist/bin/python -I tests/smoke.py || exit 1; \
	done

.venv-build/.installed:
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/python -m pip install build
	touch $@

# The floors of pyproject.toml, made exact, are the constraints; pytest stays as pinned, pip finds the rest. PyPI's builds
# of torch for Linux bring CUDA's libraries along: some 2.5 GB.
.venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep -E '^pytest.*==' constraints.txt > .venv-oldest/constraints.txt
	sed -n '/^dependencies = \[/,/^\]/s/^ *"\([^"]*\)>=\([^"]*\)".*/\1==\2/p' pyproject.toml >> .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install "$$(grep '^torch==' .venv-oldest/constraints.txt)"
	.venv-oldest/bin/python -m pip install -c .venv-oldest/constraints.txt -e '.[test]'
	touch $@

.venv-bench/.installed: pyproject.toml docs/benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install "$$(grep '^torch==' docs/benchmarks/peers.txt)"
	.venv-bench/bin/python -m pip install -c docs/benchmarks/peers.txt -r docs/benchmarks/peers.txt
	.venv-bench/bin/python -m pip install -c docs/benchmarks/peers.txt -e .
	touch $@

clean:
	rm -rf .venv .venv-bench .venv-build .venv-dist .venv-oldest .mypy_cache .pytest_cache .ruff_cache dist examples/output
	rm -rf docs/_build docs/auto_examples docs/generated docs/sg_execution_times.rst
