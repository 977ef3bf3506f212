# Everything runs from .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: demo compare memory plan-accuracy test check format generated bench clean

demo: $(READY)          ## train the quickstart recipe: about two minutes on two CPU cores
	$(BIN)/bln-train run recipes/quickstart.yaml

compare: $(READY)       ## batch against batchless, side by side
	$(BIN)/bln-train compare --norm batch,batchless

# Random images, nothing to download; sized for some 15 minutes on two CPU cores.
memory: $(READY)        ## the README's memory tables
	$(BIN)/bln-train memory cifar10_mb1 --micro-batch 1,64 --effective-batch 1,128,1024 --out memory/resnet20
	$(BIN)/bln-train memory cifar10_mb1 --set model.name=resnet18 --micro-batch 1,32 --effective-batch 1,32 \
	  --repeats 3 --out memory/resnet18
	$(BIN)/bln-train memory cifar10_mb1 --set model.name=torchvision:resnet50 \
	  --set "data={name: folder, root: unused, image_size: 224}" --micro-batch 1,8 --effective-batch 1,8 \
	  --repeats 3 --out memory/resnet50

plan-accuracy: $(READY) ## predicted against measured peaks over networks, norms, micro-batches and precisions: some 20 minutes
	$(BIN)/python benchmarks/plan_accuracy.py --out memory/plan_accuracy.csv

test: $(READY)          ## all tests; those marked gpu skip without a CUDA device
	$(BIN)/python -m pytest

check: $(READY)         ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generated: $(READY)     ## what is written from the code: the README's list of commands, the schema for editors
	$(BIN)/python tests/support/cli_reference.py
	$(BIN)/bln-train recipes schema > recipes/recipe.schema.json

bench: $(READY)         ## trainer overhead over a bare loop; beside Lightning and Accelerate where the extra `bench` is installed
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/peers.py

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
