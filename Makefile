PYTHON ?= python3
BIN := .venv/bin
LATEST := .venv-latest/bin
# Threads that spin while they wait stall each other where the cores are shared.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo lint test test-latest venv

# Train on the embedded digits, then put Triton's layers in and prove that nothing changed: no GPU, no download.
demo: venv
	$(BIN)/python train.py --config configs/digits.yaml --evaluation null
	$(BIN)/python evaluate.py --triton-layers all

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The same suite with the newest PyTorch and Triton, in an environment of its own.
test-latest: $(LATEST)/.installed
	OMP_NUM_THREADS=1 $(LATEST)/pytest -n 2

venv: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $@

$(LATEST)/.installed: pyproject.toml constraints-latest.txt
	test -x $(LATEST)/python || $(PYTHON) -m venv .venv-latest
	$(LATEST)/python -m pip install --quiet --editable ".[test]" --constraint constraints-latest.txt
	touch $@
