# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check results readme clean

demo: $(VENV)/.demo
	$(BIN)/vitfold demo -o out/demo

test: $(VENV)/.dev check
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "vitfold needs Python 3.10 to 3.13; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# pip's output is shown: the first installation downloads PyTorch and takes minutes.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[optimize]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[all,dev]'
	touch $@ $(VENV)/.demo

# The measurements behind the README, about 30 minutes on an idle machine. CIFAR10_VAL: class folders of test images;
# PHOTOS: any folder of photos, used for end-to-end times only.
CIFAR10_VAL ?= assets/demo/images
PHOTOS ?= assets/demo/images
WORK := out/results
VITB := timm:vit_base_patch16_224 --weights random
PEERS := torch,torch-compile,onnxruntime
BENCH := $(BIN)/vitfold bench --images $(PHOTOS) --limit 1

results: $(VENV)/.dev
	mkdir -p results $(WORK)
	$(BIN)/vitfold demo -o $(WORK)/demo --seconds 6 --json-output results/demo.json
	for r in 0 1 2 3 4; do $(BIN)/vitfold evaluate $(WORK)/demo/r$$r.fold --images $(CIFAR10_VAL) --json > results/cifar10-r$$r.json; done
	for r in 0 8 16; do $(BIN)/vitfold optimize $(VITB) --merge $$r -o $(WORK)/r$$r.fold --overwrite; done
	$(BENCH) $(WORK)/r0.fold $(WORK)/r8.fold $(WORK)/r16.fold --peers $(PEERS) --baseline onnxruntime --trials 15 --seconds 10 -o results/vit-b16-batch1.json
	$(BENCH) $(WORK)/r0.fold $(WORK)/r8.fold $(WORK)/r16.fold --peers $(PEERS) --baseline onnxruntime --trials 6 --seconds 12 --batch 8 -o results/vit-b16-batch8.json
	for c in gather=gather_elements gather=one_hot scatter_add=scatter_elements linear_bias=add; do \
		$(BIN)/vitfold optimize $(VITB) --merge 8 --target cpu:$$c -o $(WORK)/$$c.fold --overwrite; done
	$(BENCH) $(WORK)/r8.fold $(WORK)/gather=gather_elements.fold $(WORK)/gather=one_hot.fold $(WORK)/scatter_add=scatter_elements.fold \
		$(WORK)/linear_bias=add.fold --trials 15 --seconds 8 -o results/merge-lowerings.json

readme:
	$(BIN)/python -m vitfold.report.document README.md

clean:
	rm -rf $(VENV) out build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
