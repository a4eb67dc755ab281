# Two commands to start with: `make quickstart` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Three worker processes, also on two cores, because tests often wait. The tests of a file, or of a group such as
# "slurm", run on one worker; the longest run first.
WORKERS := -n 3 --dist loadgroup --no-loadscope-reorder

.PHONY: setup quickstart test test-thorough lint bench slurm-demo image docker-test clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("PYTHON=" + sys.executable + ": Python " + sys.version.split()[0] + " is too old. Use 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/dl2pa train configs/quickstart.yaml

# Start SLURM with two simulated nodes on this machine, submit the quickstart and follow it to its end.
slurm-demo: setup
	rm -rf build/slurm/quickstart
	slurm/testcluster up build/slurm
	. build/slurm/env && job=$$($(BIN)/dl2pa submit configs/quickstart.yaml --nodes 2 --gpus-per-node 2 \
	  --run-dir build/slurm/quickstart --json | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["job_id"])') \
	  && $(BIN)/dl2pa logs $$job --follow && $(BIN)/dl2pa jobs $$job && $(BIN)/dl2pa sync build/slurm/quickstart; \
	  status=$$?; slurm/testcluster down build/slurm; exit $$status

# Build the container image, with docker or a compatible engine (make image ENGINE=podman).
ENGINE := docker
image:
	$(ENGINE) build --build-arg REVISION=$$(git rev-parse HEAD)$$(git diff --quiet HEAD || echo +) --tag dl2pa .

# Build and test the image without an engine, as root on Debian: a user without a name, a read-only file system.
docker-test: setup
	docker/build-test build/docker

test: setup
	$(BIN)/python -m pytest $(WORKERS)

# Run the long variations that `test` leaves out.
test-thorough: setup
	$(BIN)/python -m pytest $(WORKERS) -m thorough

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/hadolint Dockerfile

bench: setup
	$(BIN)/dl2pa bench matching

clean:
	rm -rf $(VENV) build *.egg-info
