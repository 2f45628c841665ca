# make demo        run every stage on drawn scenes (a few minutes)
# make test        run the tests (5 to 7 minutes on two idle cores)
# make test-slow   run the tests that take more than 10 seconds each
# make lint        run ruff, mypy and the import contract
# make benchmark   measure every stage against plain PyTorch loops (17 to 35 minutes)
#
# Each first sets up .venv, once, and again when setup.cfg, pyproject.toml or constraints.txt
# change. "make PYTHON=python3.12 demo" takes another Python. On Linux without an NVIDIA GPU,
# "make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo" saves several GB of CUDA libraries.

PYTHON ?= python3
TORCH_INDEX ?=
VENV = .venv
ifeq ($(OS),Windows_NT)
BIN = $(VENV)/Scripts
else
BIN = $(VENV)/bin
endif
READY = $(VENV)/ready

.PHONY: demo test test-slow benchmark lint clean

demo: $(READY)
	$(BIN)/python data/demo.py

# Two processes: each takes up to 3 GB. A file's tests share fixtures, so one process runs them all.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Some need ../shared, with Flickr8k, and are skipped without it.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Measure on an idle machine: other work distorts the figures.
benchmark: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[openvino]" --constraint constraints.txt
	$(BIN)/python benchmarks/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --quiet torch torchvision --index-url $(TORCH_INDEX) \
		--constraint constraints.txt
else
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
		echo "No NVIDIA GPU found, yet pip downloads several GB of CUDA libraries with PyTorch."; \
		echo "To avoid that, stop (Ctrl-C) and add this to the same make command:"; \
		echo "  TORCH_INDEX=https://download.pytorch.org/whl/cpu"; \
	fi
endif
	$(BIN)/python -m pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info data/scenes data/features/scenes.h5 runs/demo runs/demo-joint \
		data/examples
