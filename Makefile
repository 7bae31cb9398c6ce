# `make demo`, `make test`, `make lint`: each first makes .venv with all that it needs.
# PYTHON chooses the interpreter (3.11 or later); CONSTRAINTS=constraints/py311.txt repeats our versions.
PYTHON ?= python3
CONSTRAINTS ?=
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?= demo

.PHONY: demo test test-slow lint clean

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m data_prep.main --dataset phantom --data_dir $(DEMO)/data \
	    --num_subjects 4 --size 64x64x24 --max_keypoints 64
	$(BIN)/python -m kafjax.main --config configs/phantom_pretrain.py \
	    --config.data.dir=$(DEMO)/data --workdir $(DEMO)/pretrain

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations=15

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
