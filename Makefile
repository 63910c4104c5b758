# `make demo` and `make test` do all the set-up by themselves. An active environment (venv or
# conda) is used as it is, otherwise .venv is made here.

SHELL := /bin/bash
CONFIG := configs/scenes/panoptic/mask2former_swin_mini_expedited.yaml
HALF := configs/scenes/panoptic/mask2former_swin_mini_half.yaml

ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ENVIRONMENT := $(or $(ACTIVE),.venv)
PYTHON := $(ENVIRONMENT)/bin/python
STAMP := $(ENVIRONMENT)/.expedite_d2.stamp
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help build demo demo-all test sanitize lint clean

help:
	@echo "make demo    environment, build, and the demo: baseline against two expedited settings on embedded scenes"
	@echo "make demo-all  the same for every family of systems, on one page: output/demo/report.html"
	@echo "make test    environment, build, and the whole test suite"
	@echo "make sanitize  the operators' tests with AddressSanitizer and UBSan in the CPU kernels (gcc)"
	@echo "make lint    ruff, mypy and clang-format, as CI runs them"
	@echo "make build   environment and build alone"
	@echo "make clean   remove what the build made (never .venv, caches or results)"

build: $(STAMP)

demo: $(STAMP)
	$(PYTHON) train_net.py --eval-only --config-file $(CONFIG) --compare-with $(HALF) OUTPUT_DIR output/demo

demo-all: $(STAMP)
	$(PYTHON) -m expedite_d2 demo --output output/demo

# One worker per core, and no more than memory and gain allow: each has imported all libraries, and
# one test alone takes up to a minute. They take tests from one another, so that none is idle.
WORKERS := -n logical --maxprocesses 8 --dist worksteal

test: $(STAMP)
	$(PYTHON) -m pytest $(WORKERS) $(PYTEST_ARGS)

# A package of its own, so that the build in use stays. The tests run in its folder, whose package
# Python then finds first; those of compiling, exporting and of the references tell nothing about the
# kernels. python itself is not instrumented: the sanitizers must be loaded before it, its leaks are
# not ours, and of its many allocations few are kept back.
SANITIZED := build/sanitize/lib
SANITIZERS = $(foreach name,asan ubsan,$(shell $(CXX) -print-file-name=lib$(name).so))

sanitize: $(STAMP)
	SANITIZE=1 $(PYTHON) setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16:malloc_context_size=5 \
	UBSAN_OPTIONS=print_stacktrace=1 $(abspath $(PYTHON)) -m pytest -q $(WORKERS) -p no:cacheprovider \
	-m 'not cuda' -k 'kernel or fuzz or nan or many or offset or literals' $(CURDIR)/tests/ops

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	git ls-files 'csrc/*' | grep -E '\.(cpp|h|cu|cuh)$$' | xargs $(ENVIRONMENT)/bin/clang-format --dry-run --Werror

# The environment and the build are one stamp: whatever the build reads makes it stale.
$(STAMP): $(SOURCES)
ifeq ($(ACTIVE),)
	test -x $(PYTHON) || python3 -m venv $(ENVIRONMENT)
endif
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "expedite_d2 needs Python >= 3.10")'
	$(PYTHON) -c 'import torch, torchvision' 2>/dev/null || $(PYTHON) -m pip install torch torchvision
	$(PYTHON) -m pip install --quiet 'setuptools>=77' wheel ninja
	$(PYTHON) -m pip install --no-build-isolation -e '.[test,dev]'
	touch $@

clean:
	rm -rf build expedite_d2.egg-info expedite_d2/_C*.so $(STAMP)
