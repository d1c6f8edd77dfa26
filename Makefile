# Everything a newcomer types. Each target does its own set-up: a virtual environment, the packages, the small model.
PYTHON ?= python3
VENV ?= .venv
# Folder of the small real model (a 92 MB download and a conversion, kept for all clones of this user).
CACHE ?= $(HOME)/.cache/megakd
MODELS ?= runs/quickstart/models
# PyTorch's own index of CPU wheels, where pip would otherwise fetch the CUDA build: make TORCH_INDEX=<address> ...
TORCH_INDEX ?=

BIN := $(VENV)/bin
HAVE_CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)

.PHONY: venv quickstart test gpu check clean models

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("megakd needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
ifeq ($(filter-out 0,$(HAVE_CUDA)),)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
endif
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[hf,eval,dev]'
	touch $@

models: venv
	$(BIN)/python examples/quickstart/prepare.py --cache $(CACHE) --output $(MODELS)

quickstart: models
	$(BIN)/megakd run examples/quickstart/recipe.yaml

# Two files at a time, the folders whose files take long first, so that both processes end together. That four ranks then
# wait for two cores is less than what one at a time leaves idle while it starts: 9.5 minutes for 11.8 of all but tests/unit.
test: export MEGAKD_TEST_MODEL = $(abspath $(MODELS))/reference
test: export OMP_NUM_THREADS = 1
test: models
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder \
		$(addprefix tests/,slurm e2e mcore gpu dist unit)

# For a machine with a GPU (docs/gpu_status.md): what is measured there, with its tests.
GPU_OPTIONS ?=
gpu: models
	$(BIN)/python -m benchmarks.gpu --out runs/gpu --quickstart-models $(MODELS) $(GPU_OPTIONS)
	MEGAKD_FP8_GOLDENS=runs/gpu/fp8_operands.json $(BIN)/python -m pytest -q -rs -s tests/gpu

check: venv
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
