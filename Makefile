# Two commands do everything: make quickstart (install, run, report) and make test (install, test).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   ?= runs
DATA   ?= stdlib

.PHONY: quickstart test check lint types fix sweep bench-engine bench-cache bench-training bench-parity docs docs-hf torture clean

# Installed once per change of the project's dependencies.
$(VENV)/.user: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.user

quickstart: $(VENV)/.user
	$(BIN)/bdh-bench run --models bdh,gpt2,mamba --task long_ppl --runs $(RUNS)
	$(BIN)/bdh-bench report --runs $(RUNS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

check: lint types test

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sweep: $(VENV)/.user
	$(BIN)/bdh-bench sweep bdh,gpt2,llama,mamba

bench-engine: $(VENV)/.user
	$(BIN)/python benchmarks/engine.py --trained

bench-cache: $(VENV)/.user
	$(BIN)/python benchmarks/cache_decode.py

bench-training: $(VENV)/.user
	$(BIN)/python benchmarks/training_step.py

bench-parity: $(VENV)/.user
	$(BIN)/python benchmarks/training_parity.py --data $(DATA)

docs: $(VENV)/.dev
	$(BIN)/python docs/generate_definitions.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-hf: $(VENV)/.dev
	$(BIN)/python docs/generate_hf_models.py

# kill -9 at random moments, resume, nothing lost: bounded by TORTURE_SECONDS (600) and TORTURE_KILLS (200).
torture: $(VENV)/.dev
	$(BIN)/python tests/torture.py

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
