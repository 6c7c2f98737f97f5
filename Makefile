# Every command of the project. Each works from a bare checkout: it makes .venv if there is none and
# rebuilds only what changed. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
JOBS ?= $(shell nproc)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CMAKE := $(BIN)/cmake
FAKE := build/fake_cuda/libfake_cuda.so
LEVELS := kernels memory offline serving allocator ablations peers

CXX_FILES = $(wildcard $(addsuffix /*.cpp,$(CXX_DIRS)) $(addsuffix /*.h,$(CXX_DIRS)))
CXX_DIRS := csrc allocator bench/native tests/fake_cuda tests/stress
NATIVE := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h allocator/*.cpp allocator/*.h)
PACKAGING := pyproject.toml constraints.txt

# What a stamp stands for is installed and built from the files that it depends on.
STAMP_VENV := $(VENV)/.stamp-venv
STAMP_BASE := $(VENV)/.stamp-base
STAMP_DEV := $(VENV)/.stamp-dev

# Several files are compiled as one, which halves the time: most of it is for the headers that they
# share. A wheel is compiled file by file.
CONFIGURE = $(CMAKE) -S . -G Ninja -DVATTN_BUILD_TESTS=ON \
	-DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=6 \
	-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python)

.PHONY: help demo serve test dev lint format fake stress stress-allocator test-sanitize soak load-test gpu-check bench bench-small report clean
.DELETE_ON_ERROR:

help:
	@echo "make demo           generate text with the embedded model, its KV cache in virtual memory"
	@echo "make serve          the embedded model behind OpenAI's API, on port 8000"
	@echo "make test           lint, types and the whole test suite (GPU tests skip without a GPU)"
	@echo "make dev            .venv with every extra but cuda and flash, and the fake CUDA driver"
	@echo "make lint           ruff, mypy, clang-format; make format rewrites the files"
	@echo "make fake           the fake CUDA driver, $(FAKE), and the program that replays allocations"
	@echo "make test-sanitize  the C++ stress tests under TSan and under ASan+UBSan (also: make stress)"
	@echo "make stress-allocator  a million random operations of the allocator, in the plain build"
	@echo "make soak           10,000 random requests with faults, cancellations and moving budgets"
	@echo "make load-test      guidellm and aiperf against vattn serve; installs them under .venv-load"
	@echo "make gpu-check      what a GPU can show in nine minutes; needs no network"
	@echo "make bench          the benchmarks, tables and results/*.json"
	@echo "make bench-small    every level of the comparison with paged memory, in three minutes"
	@echo "make report         the README's GPU tables and the plots, from bench/results"
	@echo "make clean          remove build products; rm -r $(VENV) removes the environment too"

demo: $(STAMP_BASE)
	$(BIN)/vattn generate --max-tokens 220 --min-tokens 220 --memory-map --stats

serve: $(STAMP_BASE)
	$(BIN)/vattn serve

# One worker per core, each with one thread. A file's tests share fixtures: it stays with one worker.
# The files' order is that of tests/conftest.py.
test: export OMP_NUM_THREADS := 1
test: lint fake
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

dev: $(STAMP_DEV) fake

lint: $(STAMP_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMP_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

fake: $(STAMP_DEV)
	$(CONFIGURE) -B build/fake_cuda -DVATTN_WERROR=ON \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath build/fake_cuda)
	$(CMAKE) --build build/fake_cuda -j $(JOBS) --target fake_cuda vattn_allocator_replay
	@test -f $(FAKE) || { echo "error: the target fake_cuda did not make $(FAKE)" >&2; exit 1; }

stress: test-sanitize

test-sanitize: run-tsan run-asan

stress-allocator: fake
	$(CMAKE) --build build/fake_cuda -j $(JOBS) --target vattn_allocator_stress
	build/fake_cuda/tests/stress/vattn_allocator_stress

soak: fake
	$(BIN)/python -m tests.soak

# Their own environments: what they depend on is large, and of other versions than ours.
LOAD_TOOLS := guidellm aiperf
VERSION_guidellm := 0.8.1
VERSION_aiperf := 0.13.0
load-test: $(STAMP_BASE) $(LOAD_TOOLS:%=.venv-load/%/.stamp)
	$(BIN)/python -m bench.load_test $(foreach tool,$(LOAD_TOOLS),--$(tool) .venv-load/$(tool)/bin/$(tool))

.venv-load/%/.stamp:
	$(PYTHON) -m venv .venv-load/$*
	.venv-load/$*/bin/python -m pip --disable-pip-version-check install $*==$(VERSION_$*)
	touch $@

# TSan needs its shadow ranges free, which kernels with much address randomization do not grant;
# setarch -R switches it off, and where that is forbidden the test runs as it is.
run-%: FIXED_ADDRESSES = $(shell setarch -R true 2>/dev/null && echo setarch -R)
run-tsan: export TSAN_OPTIONS := halt_on_error=1:second_deadlock_stack=1:$(TSAN_OPTIONS)
run-asan: export ASAN_OPTIONS := detect_leaks=1:strict_string_checks=1:$(ASAN_OPTIONS)
run-asan: export UBSAN_OPTIONS := halt_on_error=1:print_stacktrace=1:$(UBSAN_OPTIONS)
run-tsan run-asan: run-%: build-%
	$(if $(filter tsan,$*),$(FIXED_ADDRESSES)) build/$*/bin/vattn_stress
	$(if $(filter tsan,$*),$(FIXED_ADDRESSES)) build/$*/bin/vattn_allocator_stress

.PHONY: run-tsan run-asan build-tsan build-asan
build-tsan: SANITIZER := thread
build-asan: SANITIZER := address
build-tsan build-asan: build-%: $(STAMP_DEV)
	$(CONFIGURE) -B build/$* -DVATTN_SANITIZE=$(SANITIZER) -DVATTN_WERROR=ON \
		-DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
		-DCMAKE_RUNTIME_OUTPUT_DIRECTORY=$(abspath build/$*/bin)
	$(CMAKE) --build build/$* -j $(JOBS) --target vattn_stress vattn_allocator_stress

# A GPU machine may have no network: with no .venv, an interpreter that has what is needed is used as
# it is.
ifneq ($(filter gpu-check,$(MAKECMDGOALS)),)
GPU_NEEDS := {"pybind11", "pytest", "scikit_build_core", "torch", "transformers"}
GPU_READY := $(if $(wildcard $(BIN)/python),,$(shell $(PYTHON) -c 'from importlib.util import find_spec; \
	print("yes" if all(map(find_spec, $(GPU_NEEDS))) else "")'))
endif
ifeq ($(GPU_READY),yes)
gpu-check:
	$(PYTHON) -m bench.gpu.check
else
gpu-check: $(STAMP_DEV)
	$(BIN)/python -m bench.gpu.check
endif

bench: fake
	$(CONFIGURE) -B build/bench
	$(CMAKE) --build build/bench -j $(JOBS) --target vattn_ensure_bench vattn_allocator_replay
	mkdir -p results
	$(BIN)/python -m bench.vmm --json results/vmm.json
	$(BIN)/python -m bench.cache --json results/cache.json
	$(BIN)/python -m bench.scheduler --json results/scheduler.json
	$(BIN)/python -m bench.prefix --json results/prefix.json
	$(BIN)/python -m bench.overlap --json results/overlap.json
	$(BIN)/python -m bench.decoding --json results/decoding.json
	for level in $(LEVELS); do $(BIN)/python -m bench $$level \
		--json results/$$level.json --plot results/$$level.svg || exit 1; done

# To see that every level runs; what it measures at this size means nothing.
bench-small: fake
	for level in $(LEVELS); do $(BIN)/python -m bench $$level --small --device cpu \
		--json results/small/$$level.json --plot results/small/$$level.svg || exit 1; done

report: $(STAMP_DEV)
	$(BIN)/python -m bench.report

clean:
	rm -rf build dist results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(STAMP_BASE) $(STAMP_DEV)

$(STAMP_VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; run: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(STAMP_BASE): $(STAMP_VENV) $(PACKAGING) $(NATIVE)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(STAMP_DEV): $(STAMP_VENV) $(PACKAGING) $(NATIVE)
	$(PIP) install -c constraints.txt -e ".[bench,dev]"
	touch $(STAMP_BASE) $@
