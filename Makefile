# Each target sets up what it needs: a virtual environment in .venv with the tested versions (constraints.txt).
# A fresh machine needs make, python3 (3.11 to 3.13) and a package index. PYTHON=/path/to/python3.12 chooses another one.

BIN := .venv/bin
RUNTIME := .venv/.set-up-runtime
DEV := .venv/.set-up-dev
FLOWER := .venv/.set-up-flower
DOCS := .venv/.set-up-docs
MAKEFLAGS += --no-print-directory

# Libraries keep their bytecode even where the environment forbids it: without, each start of torch takes twice as long.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help quickstart quickstart-flower test check bench quality docs clean

help:
	@echo "make quickstart         the main job on the built-in demo world (about 10 minutes on 2 cores, after the downloads)"
	@echo "make quickstart-flower  real clients: a server and three sites on this machine, then compared with one process"
	@echo "make test               all tests but the slow checks of quality"
	@echo "make check              format, lint, types, import floors"
	@echo "make bench              how fast the parts are, against the plain way of doing the same"
	@echo "make quality            how good the method is: slow, a real model, known truth"
	@echo "make docs               the pages of docs/ as HTML, after writing docs/settings.md and configs/schema.json again"

quickstart: $(RUNTIME)
	@if test -e runs/demo; then \
	  echo "runs/demo exists: going on there. To start afresh: rm -r runs/demo && make quickstart"; \
	  $(BIN)/fedbiscuit run configs/demo.yaml --resume; \
	else \
	  $(BIN)/fedbiscuit run configs/demo.yaml; \
	fi

quickstart-flower: $(FLOWER)
	$(BIN)/python examples/quickstart_flower.py

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not quality" -n 2 --dist loadscope --no-loadscope-reorder

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV)
	$(BIN)/python benchmarks/speed.py

quality: $(DEV)
	$(BIN)/python -m pytest -m quality -s

docs: $(DOCS)
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean:
	rm -rf dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(RUNTIME): pyproject.toml constraints.txt scripts/set_up.sh
	sh scripts/set_up.sh runtime
	@touch $@

$(DEV): $(RUNTIME)
	sh scripts/set_up.sh dev
	@touch $@

$(FLOWER): $(RUNTIME)
	sh scripts/set_up.sh flower
	@touch $@

$(DOCS): $(RUNTIME)
	sh scripts/set_up.sh docs
	@touch $@
