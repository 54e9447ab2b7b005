# Two commands matter: `make demo` and `make test`. Both make what they need in .venv.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check bench clean

demo: $(STAMP)  ## a real model forgets a handful of facts, with the evidence: about ten minutes on two cores
	$(BIN)/locus run demo.toml -o demo --resume

test: check  ## everything that must hold before a change lands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(STAMP)  ## style, types, the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## figures for benchmarks/README.md
	$(BIN)/python benchmarks/trace_speed.py --quick

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache
