# `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN = $(VENV)/bin
# A process a core, of one thread each; models are tiny, and more threads would only wait for each other.
TEST_ENV = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
TEST_OPTIONS = --numprocesses auto --maxprocesses 4 --dist worksteal
# `make test TEST_OPTIONS="--order-seed 1"` runs in a random order; --plain-processor masks AVX and bf16.

.PHONY: demo test check format test-oldest gpu gpu-wheels clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python recipes/smollm2_qwen_coder.py --demo

test: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest $(TEST_OPTIONS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The oldest versions that pyproject.toml admits, each exactly.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/oldest_versions.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[demo,dev]'
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest $(TEST_OPTIONS)

# What no CPU can show, in 8 minutes and without an installation (recipes/benchmarks/gpu_check.py).
gpu:
	@PYTHONPATH=$(CURDIR) $(PYTHON) recipes/benchmarks/gpu_check.py --parts "$(PARTS)"

# What a GPU machine without an index may lack, for its Python: `make gpu` installs it from the folder.
GPU_PYTHON ?= 3.12
gpu-wheels:
	rm -rf .wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
	  $(addprefix --platform ,$(addsuffix _x86_64,$(addprefix manylinux,_2_28 _2_27 _2_24 _2_17 2014 1))) \
	  --dest .wheels --constraint constraints.txt trl datasets dill multiprocess rapidfuzz shtab peft

clean:
	rm -rf $(VENV) $(OLDEST) .wheels .pytest_cache .ruff_cache .mypy_cache
