# Every target creates .venv and installs what it needs first; later calls start at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRAIN_READY := $(VENV)/.ready-train
# Which torch: cpu, or cuda for the one that pip finds by itself; without it cpu where no NVIDIA GPU is. TORCH_INDEX: from where.
export TORCH TORCH_INDEX
ifneq ($(filter-out cpu cuda,$(TORCH)),)
$(error TORCH=$(TORCH): use cpu or cuda)
endif
# Arguments for the commands, for example: make train ARGS="--preset cpu-small"
ARGS ?=
# The Triton of the machine with a GPU, in a folder that Python looks into before .venv.
TRITON36 := 3.6.0
BEFORE := $(abspath $(VENV))/triton-$(TRITON36)
INTERPRETED36 := $(wildcard $(patsubst %,tests/test_%.py,interpreter activation attention_decode attention_limits \
	attention_triton cross_entropy linear_cross_entropy norm_triton rotary tune))
COMPILED36 := $(wildcard $(patsubst %,tests/test_%.py,attention_launch compile launch variants))
# Tests run one process a core, each on one thread.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup train test test-full test-triton36 fuzz bench bench-report gpu-check hub-kernel lint format clean

help:
	@echo "make train      train a small GPT (about two minutes on a CPU), evaluate it, continue a text"
	@echo "                the first time it sets up .venv; TORCH=cpu or TORCH=cuda chooses the build of torch"
	@echo "make test       run the tests (make test-full: with the full product of every grid)"
	@echo "make test-triton36   a part of the kernels' tests, on Triton $(TRITON36)"
	@echo "make fuzz       random calls of every public function for an hour (MINUTES=5: for five minutes)"
	@echo "make bench      run the benchmarks (bench/); make bench-report: docs/benchmarks.md from bench/results/"
	@echo "make gpu-check  on a machine with a GPU: tests, benchmarks, training; writes bench/results/; again: goes on"
	@echo "make hub-kernel writes kernels/ as a kernel for the Hugging Face Hub to build/hub-kernel"
	@echo "make lint       ruff and mypy"

setup: $(READY)

$(TRAIN_READY): pyproject.toml setup.py .ci/install.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c "import sys; sys.exit('error: Python 3.10 or newer is needed: make PYTHON=python3.12' * (sys.version_info < (3, 10)) or 0)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python .ci/install.py train
	@touch $@

$(READY): $(TRAIN_READY)
	@$(BIN)/python .ci/install.py dev
	@touch $@

train: $(TRAIN_READY)
	$(BIN)/wikigpt train --preset quick $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-full: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "full or not full" $(ARGS)

$(BEFORE)/.ready: $(READY)
	@echo "== installing Triton $(TRITON36) beside the other: about 190 MB to download =="
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(BEFORE) triton==$(TRITON36)
	@touch $@

# What that machine compiles: sm_90 of the compile and launch tiers. Of the interpreter's tests every seventh case: seven
# divides the length of few grids, so that each of their values is met.
test-triton36: $(BEFORE)/.ready
	PYTHONPATH=$(BEFORE) $(BIN)/python -c "import triton; assert triton.__version__ == '$(TRITON36)', triton.__version__"
	PYTHONPATH=$(BEFORE) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS) --sample 7 $(INTERPRETED36)
	PYTHONPATH=$(BEFORE) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS) \
		-k "sm_90 or not (test_compile.py or other_architectures or costs_the_host)" $(COMPILED36)

# Fresh seeds each time; the tests make the same few calls in every run.
MINUTES ?= 60
fuzz: $(READY)
	WIKIGPT_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest -q tests/test_fuzz.py -k as_long $(ARGS)

bench: $(READY)
	$(BIN)/python -m pytest bench $(ARGS)

bench-report: $(READY)
	$(BIN)/python -m bench.report

gpu-check: $(READY)
	$(BIN)/python -m bench.gpu_check $(ARGS)

hub-kernel: $(READY)
	$(BIN)/python -m wikigpt.hub_kernel build/hub-kernel

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy wikigpt kernels bench

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info wikigpt/_C*.so
