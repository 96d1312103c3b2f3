# Everything runs from a fresh clone: each target first brings its environment up to date, once.
# PYTHON=/path/to/python3 chooses the interpreter; without it the newest one that the pins were tried with is taken.
# An environment keeps the interpreter that it was made with; after `make clean` another can be chosen.

.POSIX:
.SUFFIXES:
.NOTPARALLEL:
.PHONY: help quickstart test lint parity flower docs pythons bench peers clean

VENV = .venv
PEERS = .venv-peers
# Two workers: each loads jax (~0.5 GB) and compiles on its own, and XLA's own threads take the cores beyond that.
# loadfile keeps a file's tests together, so that its module fixtures and compilations are made once.
PYTEST = $(VENV)/bin/python -m pytest
WORKERS = -n 2 --dist loadfile --max-worker-restart=0
CONFIG = configs/quickstart.py
VERSIONS = 3.12 3.13
CANDIDATES = python3.13 python3.12 python3.11 python3.14 python3 python
# Runs, new enough, and can make environments (some distributions ship venv apart).
USABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

help:
	@echo 'make quickstart  set up, download model and text, fine-tune across simulated clinics ($(CONFIG))'
	@echo 'make test        the tests, all but those that need torch or minutes'
	@echo 'make lint        ruff check, ruff format --check, pyrefly check'
	@echo 'make parity      the tests that compare with torch, transformers and peft (installs them)'
	@echo 'make flower      the tests of a federation of real processes over Flower'
	@echo 'make docs        the documentation as a site, build/site'
	@echo 'make pythons     lint and fast tests under other Pythons, those of VERSIONS that are here'
	@echo 'make bench       time the training step and a round on the real model, as JSON lines'
	@echo 'make peers       set up $(PEERS): what the benchmark compares with (torch, PEFT, Flower, Opacus)'
	@echo 'make clean       remove environments, caches and builds; runs/ and downloads stay'
	@echo
	@echo 'PYTHON=python3.12 chooses the interpreter (>= 3.11); CONFIG=configs/NAME.py another experiment,'
	@echo 'ARGS=... more options, e.g. make quickstart ARGS=--resume.'

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.fetch
	$(VENV)/bin/python -m experiments.run --config=$(CONFIG) $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) $(WORKERS) -m "not parity and not flower" $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m pyrefly check

parity: $(VENV)/.installed-parity
	$(PYTEST) -m parity $(ARGS)

flower: $(VENV)/.installed-dev
	$(PYTEST) -m flower $(ARGS)

docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m mkdocs build --strict

pythons:
	VERSIONS='$(VERSIONS)' .ci/python_versions

bench: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.bench --json $(ARGS)

peers: $(PEERS)/.installed

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Interpreter: PYTHON where given, else the first usable candidate; says what is missing where there is none.
$(VENV)/bin/python $(PEERS)/bin/python:
	@environment=$$(dirname '$(@D)'); \
	for python in $${PYTHON:-$(CANDIDATES)}; do \
	  if "$$python" -c '$(USABLE)' >/dev/null 2>&1; then \
	    echo "creating $$environment with $$python: $$("$$python" --version)"; \
	    exec "$$python" -m venv "$$environment"; \
	  fi; \
	done; \
	echo "No Python >= 3.11 with venv was found (tried: $${PYTHON:-$(CANDIDATES)})." >&2; \
	echo "Install one (on Debian and Ubuntu also the package python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

# Stamps: made again when the metadata or the pins change. One install for running, more for the tests, more for parity.
$(VENV)/.installed: setup.py constraints.txt $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: setup.py constraints.txt $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

# Torch's default wheel for Linux brings CUDA along; PIP_EXTRA_INDEX_URL pointed at PyTorch's CPU index avoids that.
$(VENV)/.installed-parity: setup.py constraints.txt $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev,parity]'
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

$(VENV)/.installed-docs: setup.py constraints.txt $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/.installed

$(PEERS)/.installed: benchmarks/peers.txt benchmarks/peers-constraints.txt $(PEERS)/bin/python
	$(PEERS)/bin/python -m pip install -c benchmarks/peers-constraints.txt -r benchmarks/peers.txt
	@touch $@
