# Every word sets up what it needs, in .venv, at the versions of constraints.txt; a second run finds it done.
#   make demo    the main job: trains a small model with KTO and writes a report
#   make test    the whole test suite, two files at a time; ARGS="tests/ops -k kto" runs a part of it, JOBS=0 one at a time
#   make nightly more seeds and methods of the slowest checks
#   make lint    ruff, mypy, clang-format and the warnings of the C++ compiler as errors; changes no file
#   make bench   the benchmarks, then the table in README.md
#   make static-report   registers, spills and shared memory of the Triton kernels, cross-compiled for sm_80, sm_90 and sm_100
#   make sanitize   the op tests on C++ kernels with the address and undefined-behaviour sanitizers of g++
#   make build   the C++ extension, after a change in csrc/
# PYTHON=python3.12 names another interpreter for .venv (3.11 to 3.13).

PYTHON ?= python3
ARGS ?=
JOBS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-warn-script-location -c constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test nightly lint bench build sanitize static-report
.DELETE_ON_ERROR:

demo: .venv/.train .venv/.built
	$(BIN)/prefopt demo $(ARGS)

test: .venv/.dev .venv/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0 $(ARGS)

nightly: .venv/.dev .venv/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m nightly $(ARGS)

bench: .venv/.dev .venv/.built
	$(BIN)/python -m benchmarks.measure_cpu $(ARGS)
	$(BIN)/python -m benchmarks.tables

static-report: .venv/.dev
	$(BIN)/python -m benchmarks.static_report $(ARGS)

# A copy of the package with its own library. Leaks are not looked for: Python and torch keep memory to the end.
SANITIZED := build/sanitize
CHECKED := linear_logprob_special linear_logprob_threads linear_logprob_lora linear_logprob_layouts linear_kl_special sequence_loss
sanitize: export PREFOPT_CXXFLAGS := -O1 -g1 -fno-wrapv -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: .venv/.dev
	CXX=g++ PREFOPT_BUILD=cpu $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -o "pythonpath=$(SANITIZED)/lib tests" \
	  -p no:cacheprovider -x -k "not triton" $(addprefix tests/ops/test_,$(addsuffix .py,$(CHECKED))) $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	include=$$($(BIN)/python -c "import torch.utils.cpp_extension as c; print(c.include_paths()[0])") && \
	flags=$$($(BIN)/python prefopt_kernels/ops/_sources.py) && for source in $(filter %.cpp,$(CSRC)); do \
	  $(CXX) -fsyntax-only $$flags -Wall -Wextra -Wconversion -Werror -isystem $$include $$source || exit 1; done
	$(BIN)/mypy

build: .venv/.torch
	$(BIN)/python setup.py -q build_ext --inplace
	@touch .venv/.built

# The stamps. Each is newer than everything that would change what it stands for.

.venv/.made:
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  'constraints.txt covers Python 3.11 to 3.13, $(PYTHON) is %d.%d: make PYTHON=python3.12 ...' % v)"
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.torch: .venv/.made constraints.txt
	$(PIP) torch setuptools wheel ninja
	@touch $@

# The extension is built by its own rule below, so that a change in csrc/ does not install anything again.
.venv/.train .venv/.dev: .venv/.torch setup.py pyproject.toml
	PREFOPT_BUILD=none $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@$(BIN)/python -c "import sys, torch; v = torch.__version__; sys.exit(None if v.split('+')[0] == '$(TORCH)' else \
	  'torch $(TORCH) was asked for and torch ' + v + ' is installed: remove .venv and try again')"
	@touch $@ $(ALSO)
.venv/.train: EXTRAS := train
.venv/.dev: EXTRAS := train,test,dev
.venv/.dev: ALSO := .venv/.train

.venv/.built: .venv/.torch setup.py prefopt_kernels/ops/_sources.py $(CSRC)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
