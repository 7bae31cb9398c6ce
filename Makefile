# `make demo`, `make test`, `make lint`: each first creates .venv with its dependencies.
# PYTHON chooses the interpreter (3.11 or later); CONSTRAINTS=constraints/py311.txt pins our versions.
PYTHON ?= python3
CONSTRAINTS ?=
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?= demo

.PHONY: demo test test-slow test-cluster test-pythons bench faults docs lint clean

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@

RUN := $(BIN)/python -m

# Six synthetic chests: `kafjax auto` sees the labels of two, and the other four check its result.
CLASSES := left_ventricle,right_ventricle,left_atrium,right_atrium,myocardium,aorta,pulmonary_artery
demo: $(INSTALLED)
	$(RUN) data_prep.main --dataset phantom --name own --data_dir $(DEMO)/reference \
	    --num_subjects 6 --size 64x64x16 --max_keypoints 64
	mkdir -p $(DEMO)/scans $(DEMO)/labels $(DEMO)/hidden
	for i in 1 2 3 4 5 6; do \
	    raw=$(DEMO)/reference/raw/phantom/ct_100$$i; \
	    cp $${raw}_image.nii.gz $(DEMO)/scans/ct_100$$i.nii.gz; \
	    if [ $$i -le 2 ]; then known=labels; else known=hidden; fi; \
	    cp $${raw}_label.nii.gz $(DEMO)/$$known/ct_100$$i.nii.gz; \
	done
	$(RUN) kafjax.auto --images $(DEMO)/scans --labels $(DEMO)/labels --classes $(CLASSES) \
	    --output $(DEMO)/study --minutes 4
	$(RUN) kafjax.evaluate --predictions $(DEMO)/study/predictions --labels $(DEMO)/hidden \
	    --classes $(CLASSES) --output $(DEMO)/scores
	$(RUN) kafjax.figures keypoints --data_dir $(DEMO)/study/data --volume ct_1004 --slice 8 \
	    --output $(DEMO)/keypoints.png
	$(RUN) kafjax.figures segmentation --workdir $(DEMO)/study/finetune \
	    --data_dir $(DEMO)/reference --volume ct_1004 ct_1005 ct_1006 \
	    --output $(DEMO)/segmentation.png
	@echo "Labels of all six scans: $(DEMO)/study/predictions; their Dice, of the four hidden ones:"
	@echo "$(DEMO)/scores. Pictures: $(DEMO)/keypoints.png, segmentation.png; $(DEMO)/study/report.html"

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" --durations=15

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# A real SLURM of one node, and two hosts as network namespaces: minutes, as root on Debian.
test-cluster: $(INSTALLED)
	@command -v slurmctld && command -v ip || \
	    (apt-get update -qq && apt-get install -y -qq slurm-wlm iproute2)
	$(RUN) tests.cluster

# On each version of Python, in an environment of its own.
PYTHONS ?= python3.11 python3.12
test-pythons:
	for python in $(PYTHONS); do \
	    $(MAKE) test PYTHON=$$python VENV=.venv-$$python || exit 1; \
	done

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
