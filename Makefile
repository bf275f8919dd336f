# make quickstart   the main job on made pictures, no download
# make test         what has to pass; make slow adds the tests that take minutes
# make check        lint, types, imports
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FAISS  := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
TESTS  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install quickstart test slow check clean

install: $(VENV)/.run-$(FAISS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cross2dual needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first, by its own name: asked for by another package, pip may take a build many gigabytes larger
$(VENV)/.run-$(FAISS): setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) with faiss-$(FAISS)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e ".[$(FAISS),onnx,remote,sentence-transformers,serve]"
	@touch $@

$(VENV)/.dev: $(VENV)/.run-$(FAISS)
	@$(PIP) -e ".[$(FAISS),dev]"
	@touch $@

quickstart: $(VENV)/.run-$(FAISS)
	$(BIN)/distill run quickstart --resume

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy distill teachers students benchmarks
	$(BIN)/lint-imports

test: check
	$(TESTS) -m "not slow"

slow: $(VENV)/.dev
	$(TESTS) -m slow

clean:
	rm -rf $(VENV) build dist *.egg-info
