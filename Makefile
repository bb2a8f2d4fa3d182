# make demo: install and train the embedded subject. make test: everything a change must pass.
# Both install the exact versions of constraints.txt, so that no release of somebody else's changes what they do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM := false
CONSTRAINTS := constraints.txt
# Of what pip fetches to build the package itself, which --constraint does not reach.
export PIP_BUILD_CONSTRAINT := $(CURDIR)/$(CONSTRAINTS)
EXTRAS := dev,optim,tracking,heic,likeness,miniature,site
# The one version that is chosen by hand: another torch computes other last bits.
LOCKED_TORCH := 2.13.0
# Processes that run tests: one a core, and one more, since some wait for a disk or a process of their own. Each holds
# torch and diffusers, about 1 GB, so never more than 8.
WORKERS ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((cores < 8 ? cores + 1 : 8)))

.PHONY: demo test check lint types tests test-slow test-gpu card test-oldest test-newest test-next soak lock \
	miniature-data miniature-weights site clean

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

# Everything that only a CUDA card can show, within nine minutes; writes docs/card.json and README's table of cards.
# benchmarks/README.md says what it measures, and how to run it without a network.
card: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.card $(CARD_ARGS)

# Kills, damage and hostile files at release length; writes docs/reliability.md. About four hours.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.soak

# The two commands that rebuild booth-mini: its data (needs npm) and its weights (hours on a CPU, resumable).
miniature-data: $(VENV)/.installed-dev
	$(BIN)/python -m tools.booth_mini.data --out build/booth_mini

miniature-weights: $(VENV)/.installed-dev
	$(BIN)/python -m tools.booth_mini.train all --data build/booth_mini --out build/booth_mini/train

# The tests with other versions than the locked ones, in an environment of its own: the lowest of each range, the newest
# of each range, and the newest of all, past the upper bounds, which tells what the next releases will break.
test-oldest test-newest test-next: test-%:
	$(PYTHON) -m venv --clear build/$*
	PIP_BUILD_CONSTRAINT= build/$*/bin/python -m pip install --quiet --upgrade pip
	$(PYTHON) -m tools.requirements $* > build/$*/requirements.txt
	PIP_BUILD_CONSTRAINT= build/$*/bin/python -m pip install --quiet --requirement build/$*/requirements.txt
	PIP_BUILD_CONSTRAINT= build/$*/bin/python -m pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 build/$*/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# constraints.txt anew: the newest of everything that pyproject.toml allows, with the torch that is chosen by hand.
lock:
	$(PYTHON) -m venv --clear build/lock
	PIP_BUILD_CONSTRAINT= build/lock/bin/python -m pip install --quiet --upgrade pip hatchling editables
	PIP_BUILD_CONSTRAINT= build/lock/bin/python -m pip install --quiet torch==$(LOCKED_TORCH) --editable '.[$(EXTRAS)]'
	build/lock/bin/python -m pip freeze --all --exclude-editable > build/lock/freeze.txt
	$(PYTHON) -m tools.lock build/lock/freeze.txt > $(CONSTRAINTS)

$(VENV)/.created: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) pip
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed Makefile
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@

# docs/ as a site, in build/site; fails at a dead link. docs/settings.md: `python -m tools.settings_page --write`.
site: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
