# `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN = $(VENV)/bin

.PHONY: demo test check format test-oldest clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python recipes/smollm2_qwen_coder.py --demo

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

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
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache .mypy_cache
