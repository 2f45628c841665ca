# make demo   set up, then run every stage on drawn scenes (a few minutes)
# make test   set up, then run the tests
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

.PHONY: demo test test-slow lint clean

demo: $(READY)
	$(BIN)/python data/demo.py

test: $(READY)
	$(BIN)/python -m pytest

# What needs time, and Flickr8k in ../shared.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info data/scenes data/features/scenes.h5 runs/demo runs/demo-joint
