# make demo: install and train the embedded subject. make test: everything a change must pass.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM := false
# Processes that run tests: one a core. Each holds torch and diffusers, about 1 GB, so never more than 8.
WORKERS ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((cores < 8 ? cores : 8)))

.PHONY: demo test check lint types tests test-slow test-gpu soak miniature-data miniature-weights clean

demo: $(VENV)/.installed
	$(BIN)/lora-booth demo

test: $(VENV)/.installed-dev lint types tests

check: test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# One thread in each: sums come in one order, bit for bit, and cores are not shared out twice. Who has no test left takes
# over half of another's, since single tests take from a millisecond to minutes.
tests: export OMP_NUM_THREADS := 1
tests: $(VENV)/.installed-dev
	$(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow

test-gpu: $(VENV)/.installed-dev
	$(BIN)/pytest -m gpu

# Kills, damage and hostile files at release length; writes docs/reliability.md. About four hours.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.soak

# The two commands that rebuild booth-mini: its data (needs npm) and its weights (hours on a CPU, resumable).
miniature-data: $(VENV)/.installed-dev
	$(BIN)/python -m tools.booth_mini.data --out build/booth_mini

miniature-weights: $(VENV)/.installed-dev
	$(BIN)/python -m tools.booth_mini.train all --data build/booth_mini --out build/booth_mini/train

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet 'torch>=2.10,<2.14'
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed Makefile
	$(BIN)/python -m pip install --quiet --editable '.[dev,optim,tracking,heic,miniature]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
