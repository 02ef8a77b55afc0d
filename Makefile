# `make run` starts everything, `make test` checks everything; both set up what they need in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

.PHONY: run test lint soak bench clean

run: $(VENV)/installed
	@! fanwire ready broker --timeout 0.2 >/dev/null 2>&1 || { \
	  echo "fanwire is running already; a second copy needs a [bus] directory and ports of its own"; exit 1; }
	@trap : INT TERM; fanwire ready --hint & hint=$$!; honcho start; code=$$?; \
	  kill $$hint 2>/dev/null; wait $$hint 2>/dev/null; exit $$code

test: lint
	pytest -m 'not soak'

lint: $(VENV)/installed-for-tests
	ruff format --check .
	ruff check .
	mypy

# A million datagrams of mixed sizes, every byte of every copy compared; some minutes.
soak: $(VENV)/installed-for-tests
	pytest -m soak --timeout 3600

bench: $(VENV)/installed-for-tests
	python -m tests.benchmarks.transmit
	python -m tests.benchmarks.relay $(BENCH)

clean:
	rm -rf $(VENV)

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fanwire needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "$(PYTHON) has no venv module: on Debian, apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml $(VENV)/bin/pip
	pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-for-tests: pyproject.toml $(VENV)/bin/pip
	pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/installed
