# `make run` starts everything, `make test` checks everything, `make quick` what takes under a minute; each sets up what
# it needs in .venv first. `make dist` and `make deb` make packages of it.
PYTHON ?= python3
VENV := .venv
# Tests wait more than they work: four times as many as a small machine has cores.
TEST_WORKERS ?= 8
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
# Without it every process that a test starts would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test quick lint soak fuzz bench bench-check dist deb test-deb cluster clean

run: $(VENV)/installed
	@exec fanwire run --hint

# Tests wait now and then: mypy and ruff run beside them.
test: $(VENV)/installed-for-tests
	@$(MAKE) --no-print-directory -j2 lint run-tests

.PHONY: run-tests
run-tests:
	pytest -m 'not soak' -n $(TEST_WORKERS) --maxschedchunk 4

# What starts no process: decisions, formats, settings, and sockets of the test's own.
quick: $(VENV)/installed-for-tests
	pytest -m 'not process and not soak' -n 2

lint: $(VENV)/installed-for-tests
	ruff format --check .
	ruff check .
	mypy

# A million datagrams of mixed sizes, every byte of every copy compared; ten minutes of kills under load; floods.
soak: $(VENV)/installed-for-tests
	pytest -m soak --timeout 3600

# What reads bytes from outside, fuzzed for ten minutes. FUZZ="--seconds 60 settings" is shorter, and one target alone.
fuzz: $(VENV)/installed-for-fuzzing
	python -m tests.fuzz $(FUZZ)

# Side by side with the relays found on PATH; as root. BENCH="--workload netflow --fan-out 1" narrows it.
bench: $(VENV)/installed-for-benchmarks
	python -m tests.benchmarks $(BENCH)

# What has become slower beside the same relays than in tests/benchmarks/recorded.json and recorded_paced.json.
bench-check: $(VENV)/installed-for-benchmarks
	python -m tests.benchmarks --check $(BENCH)
	python -m tests.benchmarks --check --paced $(BENCH)

# What goes to a package index, and a bill of materials; deploy/RELEASE.md says what else a release takes.
dist: $(VENV)/installed-for-packages
	rm -rf dist
	python -m build --quiet --outdir dist .
	python -m twine check --strict dist/*.whl dist/*.tar.gz
	python -m venv --without-pip dist/run
	pip --python dist/run/bin/python install --quiet "$$(echo dist/fanwire-*.whl)[all]"
	cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --output-file dist/sbom.cdx.json \
	  dist/run/bin/python
	rm -r dist/run

deb:
	deploy/debian/build dist

# The package in a Debian of its own that boots: installed, upgraded under load, purged. As root.
test-deb: deb $(VENV)/installed-for-tests
	mmdebstrap --quiet --variant=minbase --include=dbus,iproute2,python3,systemd,systemd-sysv bookworm dist/debian.tar
	pytest -m soak tests/deploy/test_package.py

# Three relays and three NATS servers in network namespaces, to try and to kill; as root or as a plain user.
cluster: $(VENV)/installed-for-tests
	@exec python -m deploy.ha.cluster

clean:
	rm -rf $(VENV) dist

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fanwire needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "$(PYTHON) has no venv module: on Debian, apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml $(VENV)/bin/pip
	pip install --quiet --disable-pip-version-check --editable '.[console]'
	@touch $@

$(VENV)/installed-for-tests: pyproject.toml $(VENV)/bin/pip
	pip install --quiet --disable-pip-version-check --editable '.[test,console,uplink]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-for-fuzzing: pyproject.toml $(VENV)/bin/pip
	pip install --quiet --disable-pip-version-check --editable '.[test,console,uplink,fuzz]'
	@touch $@ $(VENV)/installed $(VENV)/installed-for-tests

$(VENV)/installed-for-benchmarks: pyproject.toml $(VENV)/bin/pip
	pip install --quiet --disable-pip-version-check --editable '.[test,console,uplink,bench]'
	@touch $@ $(VENV)/installed $(VENV)/installed-for-tests

$(VENV)/installed-for-packages: pyproject.toml $(VENV)/bin/pip
	pip install --quiet --disable-pip-version-check --editable '.[all,package]'
	@touch $@ $(VENV)/installed
