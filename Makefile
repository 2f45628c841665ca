# make demo        set up, then run every stage on drawn scenes (a few minutes)
# make test        set up, then run the tests
# make benchmark   set up, then measure every stage against what people do (10 to 15 minutes)
#
# Set-up makes .venv with everything in it; it is done once, and again when setup.cfg,
# pyproject.toml or constraints.txt change. "make PYTHON=python3.12 demo" takes another Python.

PYTHON ?= python3
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

test: $(READY)
	$(BIN)/python -m pytest

# What needs time, and Flickr8k in ../shared.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# With the machine to itself: other work beside it spoils the figures.
benchmark: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[benchmark]" --constraint constraints.txt
	$(BIN)/python benchmarks/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info data/scenes data/features/scenes.h5 runs/demo runs/demo-joint \
		data/examples
