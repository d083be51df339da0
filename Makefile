# Thin calls of scripts/; the README gives the same commands without make.
VENV ?= .venv
export PGOLF_VENV = $(VENV)
PYTHON_BIN = $(VENV)/bin/python
# Test processes. One on a GPU machine: the GPU tests measure what is queued on the device.
JOBS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 0 || echo 2)
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.inl')

.PHONY: demo test check lint format bench bench-check setup setup-dev setup-bench clean

demo: setup
	$(VENV)/bin/pgolf demo

test: setup
	OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest -n $(JOBS) -m "not long"

check: setup-dev lint
	sh scripts/check.sh

bench: setup-bench
	$(VENV)/bin/pgolf bench

# pytest-benchmark's comparison with the results that this GPU and CPU have in bench/results: a median more than 15 %
# above the record's fails. A suite without any record is refused, single rows without one are named at the end
# (bench/storage.py).
bench-check: setup-bench
	$(VENV)/bin/pgolf bench --check

lint: setup-dev
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(PYTHON_BIN) -m mypy

format: setup-dev
	$(PYTHON_BIN) -m ruff check --fix .
	$(PYTHON_BIN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

setup:
	@sh scripts/setup.sh

setup-dev:
	@PGOLF_EXTRAS=test,dev sh scripts/setup.sh

setup-bench:
	@PGOLF_EXTRAS=test,bench sh scripts/setup.sh

clean:
	rm -rf build dist *.egg-info pgolf_kernels/_native*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
