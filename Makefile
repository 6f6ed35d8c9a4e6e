# Every target sets up what it needs, from a fresh clone: a virtual environment in .venv, the pinned
# dependencies, the native library. A second run only redoes what has changed.
#   make demo        train a small network with the fused kernels and show what they save
#   make test        every quick test; TEST_PROCESSES says by how many processes
#   make test-slow   the tests that take long: other builds, another torch
#   make fuzz        calls drawn at random, raw operators under sanitizers; FUZZ_EXAMPLES and FUZZ_SEED choose (docs/fuzzing.md)
#   make lint        style and types
#   make bench       time the step against its peers
#   make bench-tail  time the tail of a block (batch norm and step) against the plain one
#   make bench-networks  time whole networks, with and without attention
#   make wheel       build what users install into dist/: an sdist, and the wheel made from it
#   make clean       remove what was built (not .venv)
# DIA_KERNELS_BUILD and DIA_KERNELS_CUDA_ARCHS (see setup.py) choose what is built; run `make clean`
# after a change of theirs.

# CUDA code for the GPUs that are here; where there is none, for one architecture, to see that it compiles. `pip install .`
# builds for all.
architectures_asked_for := $(DIA_KERNELS_CUDA_ARCHS)
gpus_here := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | tr -d . | sort -u)
semicolon := ;
export DIA_KERNELS_CUDA_ARCHS ?= $(or $(subst $() $(),$(semicolon),$(strip $(gpus_here))),90)

PYTHON ?= python3
python := .venv/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
native_sources := setup.py CMakeLists.txt dia_kernels/schemas.py $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
formatted_sources := $(filter csrc/%,$(native_sources))

.PHONY: demo test test-slow fuzz lint bench bench-tail bench-networks wheel clean
.DELETE_ON_ERROR:

# In as many processes as there are cores, four at most: each takes up to 3 GB. Their threads, more than there are cores,
# sleep while they wait and do not spin.
TEST_PROCESSES ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
pytest_in_parallel := OMP_WAIT_POLICY=passive $(python) -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

FUZZ_EXAMPLES ?= 2000
FUZZ_SEED := $(or $(FUZZ_SEED),$(shell date +%s))

demo: build/native.stamp
	$(python) -m dia_kernels demo

test: build/native.stamp
	$(pytest_in_parallel) -m "not slow and not gpu"

test-slow: build/native.stamp
	$(pytest_in_parallel) -m "slow and not gpu"

fuzz: build/native.stamp
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FUZZ_SEED=$(FUZZ_SEED) $(python) -m pytest tests/test_fuzz.py -rP \
	  --hypothesis-show-statistics --hypothesis-seed=$(FUZZ_SEED)

lint: .venv/dependencies.stamp
	$(python) -m ruff check
	$(python) -m ruff format --check
	.venv/bin/clang-format --dry-run -Werror $(formatted_sources)
	$(python) -m mypy

bench: build/native.stamp
	$(python) bench/run.py

bench-tail: build/native.stamp
	$(python) bench/tail.py

bench-networks: build/native.stamp
	$(python) bench/networks.py

# With CUDA code for every architecture, unless the caller chose some. auditwheel tells from the library which systems
# can load it, and names them in the wheel's tag; it may add nothing and change nothing: torch's libraries come with torch.
wheel: .venv/dependencies.stamp
	rm -rf dist build/dist
	DIA_KERNELS_CUDA_ARCHS='$(architectures_asked_for)' $(python) -m build --no-isolation --outdir build/dist
	$(python) -m auditwheel repair --allow-pure-python-wheel --patcher none --exclude libtorch.so --exclude libtorch_cpu.so \
		--wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist

clean:
	rm -rf build dist dia_kernels/lib

# The package is installed in place and without its library, which the next rule builds: a change in
# csrc then costs no look at the dependencies.
.venv/dependencies.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(pip) install --constraint constraints.txt setuptools
	DIA_KERNELS_BUILD=none $(pip) install --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

build/native.stamp: .venv/dependencies.stamp $(native_sources)
	$(python) setup.py --quiet build_ext --inplace
	touch $@
