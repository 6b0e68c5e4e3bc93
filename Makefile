# From a bare clone, with python3 (3.10 to 3.14), g++ and make:
#   make demo     train the character model, once with a loop and once with fusedrnn
#   make test     run the tests (SLOW=1: all tests; ARGS="-k name": some)
#   make mutants  change 200 lines, one at a time, and run the relevant tests for each; takes half an
#                 hour or more (ARGS="--count 20 --files csrc/checks.h")
#   make lint     check formatting, lint and types; `make format` fixes them where it can
#   make docs     build the documentation in build/docs/index.html
#   make bench    time fusedrnn against its peers (ARGS="--set wide")
#   make cuda-build      build and link the CUDA engine without a GPU (downloads torch with CUDA,
#                        the latest or TORCH=2.11.0)
#   make cuda-resources  regenerate tests/cuda/resources.txt: registers of each CUDA kernel
#   make cuda-step-cost  regenerate tests/cuda/step_cost.txt: instructions of a step, by part
#   make gpu-speed       on a machine with a GPU, 200 s: build, smoke tests, benchmark against cuDNN
#   make gpu-tune        200 s: latencies, every regime, a sweep of sizes, ncu profiles
#   make gpu-truth       240 s: tests, compute-sanitizer, every kernel
#   make gpu-check       all three, one after another (OUT=folder for the results; EMULATED=1 tries
#                        them without a GPU)
#   make clean    remove build outputs; `make distclean` also removes .venv
# To use another interpreter: make PYTHON=python3.12 (after make distclean).

PYTHON ?= python3
CXX ?= g++
export CXX

VENV := .venv
CUDA_VENV := .venv-cuda$(TORCH)
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)  # where torch's build looks for ninja

CPP_FILES = $(shell git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' \
  bench/probes.cu 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')

.DEFAULT_GOAL := test
.PHONY: demo test mutants bench lint format docs build clean distclean check-tools
.PHONY: cuda-build cuda-resources cuda-step-cost gpu-check gpu-speed gpu-tune gpu-truth

demo: build
	$(BIN)/python -m fusedrnn charlm $(ARGS)

# One worker per core, 8 at most, with one torch thread each (tests/conftest.py).
test: build
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
	  $(if $(SLOW),,-m "not slow") $(ARGS)

mutants: build
	$(BIN)/python tests/tooling/mutants.py $(ARGS)

bench: build
	$(BIN)/python bench/bench_rnn.py $(ARGS)

# Uses the installed torch if there is no .venv; downloads nothing.
gpu-speed gpu-tune gpu-truth: $(if $(EMULATED),build)
	@$(PYTHON) bench/gpu_check.py $(@:gpu-%=%) $(if $(EMULATED),--emulated) \
	  $(if $(OUT),--out $(OUT)) $(ARGS)

gpu-check:
	@$(MAKE) --no-print-directory --keep-going gpu-speed gpu-tune gpu-truth

cuda-resources: $(VENV)/pins
	$(BIN)/python tests/cuda/resources.py

cuda-step-cost: $(VENV)/pins
	$(BIN)/python tests/cuda/step_cost.py

cuda-build: $(CUDA_VENV)/torch
	$(CUDA_VENV)/bin/python tests/cuda/build_extension.py

# An environment of its own for the CUDA build of torch, which has several GB.
$(CUDA_VENV)/torch:
	@$(MAKE) --no-print-directory check-tools
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --disable-pip-version-check \
	  torch$(if $(TORCH),==$(TORCH)) setuptools ninja pybind11
	@touch $@

lint: $(VENV)/pins
	$(if $(CPP_FILES),$(BIN)/clang-format --dry-run -Werror $(CPP_FILES))
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/pins
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Warnings are errors, and so are links that lead nowhere. README.md is the front page.
docs: build
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/docs
	@cp build/docs/README.html build/docs/index.html

# Always runs, because ninja decides what has changed; takes two seconds if nothing has.
# Objects stay in build/; `pip install -e .` would recompile everything each time.
build: $(VENV)/pins
	@$(BIN)/python setup.py --quiet build_ext --inplace

# Installed once, and again when the pins change. The .pth file makes the checkout importable.
$(VENV)/pins: .ci/requirements.txt
	@$(MAKE) --no-print-directory check-tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r $<
	@$(BIN)/python -c 'import pathlib, sysconfig; \
	  pathlib.Path(sysconfig.get_path("purelib"), "fusedrnn.pth").write_text("$(CURDIR)\n")'
	@touch $@

check-tools:
	@command -v $(firstword $(CXX)) > /dev/null || { \
	  echo "fusedrnn: no C++ compiler '$(CXX)'; install g++ (Debian: apt-get install g++)" >&2; exit 1; }
	@command -v $(PYTHON) > /dev/null || { \
	  echo "fusedrnn: no '$(PYTHON)'; install Python 3.10 to 3.14" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "fusedrnn: needs Python 3.10 to 3.14, but $(PYTHON) is" \
	    "$$($(PYTHON) -V 2>&1 | head -n 1); choose one with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "fusedrnn: $(PYTHON) has no venv (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "fusedrnn: $(PYTHON) has no headers (Debian: apt-get install python3-dev)" >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info fusedrnn/*.so fusedrnn/_build_info.py
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV) .venv-cuda*
