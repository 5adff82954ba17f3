# Each line is a command you could type; README.md shows them for people without make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test prove lint starter clean

quickstart: .venv/ready
	$(BIN)/lorakeet quickstart --run runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: .venv/dev-ready
	$(BIN)/python -m pytest

# Every test and every trial, with a table of the trials at the end, which is kept as
# benchmarks/results/prove.md: hours on two cores.
TRIALS ?= 200
prove: .venv/dev-ready
	LORAKEET_KILL_TRIALS=$(TRIALS) $(BIN)/python -m pytest -m "slow or not slow" --timeout 7200 --trials benchmarks/results/prove.md

lint: .venv/dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: pyproject.toml setup_torch.py
	$(PYTHON) -m venv .venv
	$(BIN)/python setup_torch.py
	$(BIN)/pip install -e '.[plots,tensorboard]'
	touch $@

.venv/dev-ready: .venv/ready
	$(BIN)/pip install -e '.[dev]'
	touch $@

# Rebuilds the starter model from its scripts: about an hour on two cores.
starter: .venv/dev-ready
	$(BIN)/python -m starter.build_corpus --out build/starter
	$(BIN)/python -m starter.build_base --corpus build/starter --out build/starter/base
	$(BIN)/lorakeet train starter/recipe.yaml --run build/starter/run
	$(BIN)/python -m starter.finish --run build/starter/run
	$(BIN)/python -m starter.build_quickstart

clean:
	rm -rf build dist runs .pytest_cache .ruff_cache
