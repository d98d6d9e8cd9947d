PYTHON ?= python3
BIN := .venv/bin
LATEST := .venv-latest/bin
# Threads that spin while they wait stall each other where the cores are shared.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: dashboard demo lint test test-browser test-latest venv

# Train on the embedded digits, then put Triton's layers in and prove that nothing changed: no GPU, no download.
demo: venv
	$(BIN)/python train.py --config configs/digits.yaml --evaluation null
	$(BIN)/python evaluate.py --triton-layers all
	@echo "How fast it is on a GPU:  make dashboard   (an evaluation recorded on one; no GPU is needed to look at it)"

# TensorBoard with an evaluation that was recorded on a GPU.
dashboard: venv
	@echo "then open http://localhost:6006/?smoothing=0#timeseries&_smoothingWeight=0"
	$(BIN)/tensorboard --logdir docs/recorded_run --port 6006

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The dashboard in a real browser: skipped where there is no Chromium (apt-get install chromium).
test-browser: venv
	$(BIN)/python -m pip install --quiet --editable ".[test,browser]" --constraint constraints.txt
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/browser

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
