# `make` alone lists what there is. PYTHON and VENV choose the interpreter and the environment.
PYTHON ?= python3
VENV ?= .venv
SANITIZERS ?= address,undefined
RESULT ?= $(or $(shell $(BIN)/python benchmarks/machine.py),cpu)
GPU_CHECK ?=
TORCH ?= $(shell grep '^torch==' constraints.txt)

BIN := $(VENV)/bin
SOURCES := $(shell find csrc tests/cuda_emulation tests/kernels/thread_team -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := setup.py pyproject.toml $(wildcard build_backend/*.py)
SANITIZED := build/sanitized
# The CUDA library, where its compiler is; HNE_CUDA=0 turns it off. A torch without CUDA cannot load it, so that only the
# table of the kernels asks for it then.
NVCC := $(or $(if $(CUDA_HOME),$(wildcard $(CUDA_HOME)/bin/nvcc)),$(shell command -v nvcc 2>/dev/null))
CUDA_LIBRARY := $(if $(NVCC),$(if $(filter 0,$(HNE_CUDA)),,hne_kernels/_C_cuda.so))
# A process for each core, or one; pytest-benchmark, which would warn that it cannot measure so, stays away.
SERIAL := -x -q -p no:benchmark
PARALLEL := $(SERIAL) -n auto --dist worksteal

# The first is for what pip installs, and with older versions of pip for what it builds with as well.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:

.PHONY: help
help: ## show this list
	@echo "make TARGET [PYTHON=python3] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.built ## train a small ensemble on handwritten digits: a table, and a plot in runs/demo
	$(BIN)/hne train --data digits --preset hne_tiny --out runs/demo --overwrite

.PHONY: test
test: lint kernels check levels sanitize ## everything CI runs: lint, kernels, check, levels, sanitize

.PHONY: check
check: $(VENV)/.built ## run the test suite
	$(BIN)/pytest $(PARALLEL)

# The reference is PyTorch's own kernels and oneDNN's, which differ with the instruction set.
OLDEST := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41

LEVELS := level-oldest level-sse41 level-avx2
level-oldest: LEVEL := $(OLDEST)
level-sse41: LEVEL := ONEDNN_MAX_CPU_ISA=SSE41
level-avx2: LEVEL := ONEDNN_MAX_CPU_ISA=AVX2

# Side by side, in one process each: they take half a minute, a good part of which is the start of processes.
.PHONY: levels $(LEVELS)
levels: $(VENV)/.built ## test the reference with PyTorch's and oneDNN's kernels for older processors
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=target $(LEVELS)

$(LEVELS):
	@echo "reference, $(LEVEL)"
	@env $(LEVEL) $(BIN)/pytest $(SERIAL) -k reference tests/kernels/test_parity.py tests/kernels/test_reference.py

.PHONY: kernels
kernels: $(VENV)/.built $(CUDA_LIBRARY) ## compile all GPU kernels, without a GPU: resources, lint of the machine code, predicted time
	TRITON_INTERPRET=0 $(BIN)/python tools/gpu_kernels.py

.PHONY: bench
bench: $(VENV)/.built ## compare the speed with that of others: tables and plots in benchmarks/results
	@$(MAKE) --no-print-directory $(VENV)/.peers || echo "without the inference engines that are not installed"
	$(BIN)/pytest --benchmark --benchmark-save-table benchmarks/results/$(RESULT)
	$(BIN)/python benchmarks/plot.py benchmarks/results/$(RESULT).json

.PHONY: gpu-check
gpu-check: ## on a machine with a GPU: GPU_CHECK=first, second, third (build and smoke table, tests, speed)
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK)

# torch's libraries are not copied into a wheel: it uses those of the environment. The version of a wheel with the CUDA
# library names its CUDA, as torch's does: 0.1.0+cu130.
CUDA_VERSION = $(shell $(NVCC) --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/cu\1\2/p')

.PHONY: wheels
wheels: $(VENV)/.release ## write a wheel for all versions of Python to dist/; with HNE_CUDA=1 one with the CUDA library
	rm -rf build/wheels
	HNE_CUDA=$(or $(HNE_CUDA),0) HNE_LOCAL_VERSION=$(if $(filter 1,$(HNE_CUDA)),$(CUDA_VERSION)) \
		$(BIN)/python -m build --no-isolation --wheel --outdir build/wheels
	$(BIN)/abi3audit --strict --summary build/wheels/*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist build/wheels/*.whl

.PHONY: sdist
sdist: $(VENV)/.release ## write the sources to dist/
	$(BIN)/python -m build --no-isolation --sdist --outdir dist

.PHONY: wheel-check
wheel-check: ## install the wheels of dist/ in new environments and try them: PYTHON=python3.12 TORCH=torch==2.11.0
	env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(PYTHON) tools/wheel_check.py --torch $(TORCH) dist/*.whl

.PHONY: release-check
release-check: ## whether dist/ has the sources and a wheel of the version that TAG names: TAG=v0.1.0
	@test "$(TAG)" && ls dist/hne_kernels-$(TAG:v%=%).tar.gz dist/hne_kernels-$(TAG:v%=%)-*manylinux*.whl

.PHONY: lint
lint: $(VENV)/.installed ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

.PHONY: format
format: $(VENV)/.installed ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# Python itself is not instrumented, so the sanitizer's runtime is loaded ahead of it; libstdc++ too,
# or its exceptions are thrown before the sanitizer has found them. Without -s what it says would be lost.
# Our lowest instruction set is tested together with PyTorch's and oneDNN's, and with AMX's tiles, which this build
# emulates.
.PHONY: sanitize
sanitize: $(VENV)/.built $(SANITIZED)/.built ## run the C++ ops under address and undefined-behaviour sanitizers
	@levels=$$($(BIN)/python -c "from hne_kernels.extension import cpu_library; \
		print(*cpu_library().cpu_capabilities_supported().split(', '))") || exit 1; \
	export HNE_EXTENSION_DIR=$(SANITIZED)/hne_kernels; \
	preload="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	for level in $$levels; do \
		echo "sanitizers, $$level instructions"; \
		case $$level in portable) oldest="$(OLDEST)"; bfloat16=amx ;; *) oldest=; bfloat16=1 ;; esac; \
		case "$$levels" in *$$level) tests= ;; *) tests="not any_level" ;; esac; \
		env $$oldest HNE_CPU_CAPABILITY=$$level HNE_CPU_BF16=$$bfloat16 LD_PRELOAD="$$preload" \
			$(BIN)/pytest $(PARALLEL) -s -k 'cpp or fused_layers or quantized_layers' -m "$$tests" \
			tests/kernels/test_parity.py tests/kernels/test_properties.py \
			tests/kernels/test_fused_layers*.py tests/kernels/test_quantized_layers.py tests/kernels/test_winograd.py || exit 1; \
	done

# Waiting threads give way: on a busy machine they would keep the working ones from their processor. Bytecode is kept
# even if the machine's environment says otherwise: pytest would rewrite all tests in each of its processes.
check levels sanitize: export OMP_WAIT_POLICY := passive
check levels sanitize: export PYTHONDONTWRITEBYTECODE :=

.PHONY: notebooks
notebooks: ## write the notebooks of the examples from their scripts
	$(PYTHON) tools/notebooks.py

.PHONY: docs
docs: $(VENV)/.docs ## build the documentation site in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: clean
clean: ## remove what was built; the environment stays
	rm -rf build dist site *.egg-info hne_kernels/*.so $(VENV)/.built

# Each stamp stands for a step done; it is taken again when what it depends on is newer.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch
	@touch $@

# Without isolation: what is compiled now is then found up to date by the steps below.
$(VENV)/.installed: $(VENV)/.torch $(BUILD_FILES)
	$(BIN)/pip install setuptools ninja
	$(BIN)/pip install --no-build-isolation -e '.[test,dev,triton]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python setup.py build_ext --inplace
	@touch $@

# Objects that are up to date are not compiled again.
hne_kernels/_C_cuda.so: $(VENV)/.built
	HNE_CUDA=1 $(BIN)/python setup.py build_ext --inplace
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --no-build-isolation -e '.[docs]'
	@touch $@

$(VENV)/.peers: $(BUILD_FILES)
	$(BIN)/pip install --no-build-isolation -e '.[peers]'
	@touch $@

$(VENV)/.release: $(VENV)/.installed
	$(BIN)/pip install --no-build-isolation -e '.[release]'
	@touch $@

$(SANITIZED)/.built: $(VENV)/.installed $(SOURCES)
	HNE_CUDA=0 HNE_SANITIZE=$(SANITIZERS) $(BIN)/python setup.py build_ext --build-lib $(SANITIZED)
	@touch $@
