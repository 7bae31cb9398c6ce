# `make demo`, `make test`, `make lint`: each first creates .venv with its dependencies.
# PYTHON chooses the interpreter (3.11 or later); CONSTRAINTS=constraints/py311.txt pins our versions.
PYTHON ?= python3
CONSTRAINTS ?=
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?= demo

.PHONY: demo test test-slow bench faults docs lint clean

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@

RUN := $(BIN)/python -m

demo: $(INSTALLED)
	$(RUN) data_prep.main --dataset phantom --data_dir $(DEMO)/data \
	    --num_subjects 6 --size 64x64x24 --max_keypoints 64
	$(RUN) kafjax.main --config configs/phantom_pretrain.py \
	    --config.data.dir=$(DEMO)/data --workdir $(DEMO)/pretrain --config.num_steps=120
	$(RUN) kafjax.main --config configs/phantom_finetune.py --config.init_from=$(DEMO)/pretrain \
	    --config.data.dir=$(DEMO)/data --config.data.num_labeled=2 --workdir $(DEMO)/finetune
	$(RUN) kafjax.evaluate --workdir $(DEMO)/finetune
	$(RUN) kafjax.predict --workdir $(DEMO)/finetune --output $(DEMO)/ct_1004_prediction.nii.gz \
	    --input $(DEMO)/data/raw/phantom/ct_1004_image.nii.gz
	$(RUN) kafjax.figures keypoints --data_dir $(DEMO)/data --dataset phantom \
	    --volume ct_1004 --slice 12 --output $(DEMO)/keypoints.png
	$(RUN) kafjax.figures similarity --workdir $(DEMO)/pretrain $(DEMO)/finetune \
	    --volume ct_1004 --slice 12 --output $(DEMO)/similarity.png
	$(RUN) kafjax.figures segmentation --workdir $(DEMO)/finetune --output $(DEMO)/segmentation.png
	$(RUN) benchmarks.compute --edges 128,256 --filters 8 --output $(DEMO)
	$(RUN) kafjax.report --workdir $(DEMO)/pretrain $(DEMO)/finetune --output $(DEMO)/report.html
	@echo "$(DEMO)/ct_1004_prediction.nii.gz lies on $(DEMO)/data/raw/phantom/ct_1004_image.nii.gz."
	@echo "Figures: $(DEMO)/keypoints.png similarity.png segmentation.png compute.png; all: $(DEMO)/report.html"

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations=15

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Without PyTorch only kafjax is timed: pip install '.[bench]' adds the peers.
bench: $(INSTALLED)
	$(RUN) benchmarks.main

# Damages files, fills disks and kills runs; prints and writes the table.
faults: $(INSTALLED)
	$(RUN) tests.campaigns.main --output faults_table

# The API reference, from docstrings.
docs: $(INSTALLED)
	$(RUN) pdoc --docformat google --output-directory build/docs kafjax data_prep
	@echo "build/docs/index.html"

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
