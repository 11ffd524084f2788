# Two commands matter: `make demo` and `make test`. Each builds its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: demo test lint types unit test-slow test-network test-flower nightly fuzz soak bench docs docs-test clean

demo: $(VENV)/.demo
	$(BIN)/lamina demo $(DEMO)

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev  # two tests at a time, so a thread for each: torch's would wait for each other on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-network: $(VENV)/.dev
	$(BIN)/python -m pytest -m network

# With Flower: our app on a grid in memory, and Flower's own programs on the loopback. Which of them: make test-flower
# FLOWER="not slow" (without the long ones), FLOWER="not flower" (without Flower's programs)
FLOWER ?=
test-flower: $(VENV)/.flower
	$(BIN)/python -m pytest tests/flower -rs -o addopts="-q --strict-markers" -m "$(FLOWER)"

nightly: $(VENV)/.dev
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/wire/test_wire_round_trips.py -n 2
	$(BIN)/python -m pytest -m slow tests/test_tutorials.py tests/test_new.py

# The reliability table, row by row; what has a result for this commit is not run again. ROW=R1:fedlama runs one.
soak: $(VENV)/.dev
	$(BIN)/python benchmarks/reliability.py $(if $(ROW),--row $(ROW))

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py --site build/docs && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-test: $(VENV)/.docs
	$(BIN)/python -m pytest tests/docs tests/explain -o addopts="-q --strict-markers" -m "not network"

# Three targets of ten minutes, two at a time. Where atheris cannot be had, inputs are mutated by chance.
fuzz: $(VENV)/.fuzz
	$(BIN)/python fuzz/run.py $(FUZZ)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/speed.py

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) -e '.[demo,dev]'
	touch $@

$(VENV)/.flower: $(VENV)/.dev
	$(PIP) -e '.[flower]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(PIP) -e '.[fuzz]' || echo "no atheris for this Python or machine"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
