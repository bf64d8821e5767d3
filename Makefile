# `make help` lists what there is to do.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin/python
# empty: use the torch that --system-site-packages brings (a GPU image, a cluster module)
TORCH ?= requirements-torch.txt
VENV_FLAGS ?=
DATA := data/quickstart
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
# what git knows or would add, so that a new file is found by itself
files = $(shell git ls-files --cached --others --exclude-standard -- $(1))

.DEFAULT_GOAL := help
.PHONY: help setup train test fuzz test-long test-faults test-image test-slurm check reference format clean distclean

help:  ## what there is to do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## make .venv with the pinned requirements

$(VENV)/.installed: requirements-torch.txt requirements.txt requirements-dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3.11 found: install Python 3.11 and its venv module, or set PYTHON="; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11: install it, or set PYTHON="; exit 2; }
	@echo "setting up $(VENV) (about 2 minutes)"
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || { echo "error: the venv module is missing: apt-get install python3-venv"; exit 2; }
	$(if $(TORCH),$(PIP) -r $(TORCH))
	$(PIP) -r requirements.txt -r requirements-dev.txt
	@# a test compares with its optimizer, which needs nothing more; its package would bring bitsandbytes
	$(PIP) --no-deps galore-torch==1.0
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(DATA)/corpus/train.jsonl: | $(VENV)/.installed
	$(RUN) tools/make_corpus.py $(DATA)/corpus

$(DATA)/tokenizer.model: $(DATA)/corpus/train.jsonl
	$(RUN) tools/train_tokenizer.py $< --output $(DATA)/tokenizer --vocab-size 4096 --overwrite

$(DATA)/%.idx: $(DATA)/tokenizer.model
	$(RUN) tools/preprocess_data.py $(DATA)/corpus/$*.jsonl --output $(DATA)/$* --tokenizer-model $< --overwrite

train: $(VENV)/.installed $(DATA)/train.idx $(DATA)/valid.idx  ## train the quickstart on the text that Python ships
	$(RUN) pretrain_crnet.py --config examples/quickstart.yaml

test: setup  ## the whole suite but the long matrices
	$(RUN) -m pytest -m "not long and not faults and not image and not slurm" -n 2 --dist loadfile --no-loadscope-reorder

test-long: setup  ## the long matrices
	$(RUN) -m pytest -m long

test-faults: setup  ## kill runs a hundred times at random moments; 20 to 40 minutes (FAULTS_SEED=2 FAULTS_KILLS=100)
	$(RUN) -m pytest -m faults -rP

fuzz: setup  ## odd inputs of every kind, random layouts and runs: FUZZ_CASES=400 (of each), FUZZ_SEED=2
	FUZZ_CASES=$${FUZZ_CASES:-400} FUZZ_SEED=$${FUZZ_SEED:-2} $(RUN) -m pytest tests/fuzz -rP -n 2

test-image: setup  ## build the container image and train in it (installs podman and debootstrap; root on Debian)
	tests/image/prepare.sh
	$(RUN) -m pytest -m image tests/image

test-slurm: setup  ## submit the shipped scripts to a real two-node SLURM on this host (installs SLURM; root on Debian)
	tests/slurm/prepare.sh
	$(RUN) -m pytest -m slurm tests/slurm

check: setup  ## ruff (lint and format), mypy, import-linter, hadolint and shellcheck
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint $(call files,'Dockerfile' '*/Dockerfile' '*.Dockerfile')
	$(VENV)/bin/shellcheck --external-sources $(call files,'*.sh' '*.sbatch' '.ci/*')

reference: setup  ## write docs/reference.md from the schema
	$(RUN) -m megatron_crnet.config.reference > docs/reference.md

format: setup  ## put the code into ruff's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove runs, data and caches; keep .venv
	rm -rf runs data .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)
