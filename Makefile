# The two commands a newcomer needs: `make quickstart` and `make test`. Both set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two worker processes. The tests of a file, or of a group such as "slurm", stay on one of them; the longest come first.
WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: setup quickstart test test-thorough lint bench slurm-demo image docker-test clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/dl2pa train configs/quickstart.yaml

# A real SLURM of two pretended nodes on this machine; the quickstart submitted to it and followed to its end.
slurm-demo: setup
	rm -rf build/slurm/quickstart
	slurm/testcluster up build/slurm
	. build/slurm/env && job=$$($(BIN)/dl2pa submit configs/quickstart.yaml --nodes 2 --gpus-per-node 2 \
	  --run-dir build/slurm/quickstart --json | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["job_id"])') \
	  && $(BIN)/dl2pa logs $$job --follow && $(BIN)/dl2pa jobs $$job && $(BIN)/dl2pa sync build/slurm/quickstart; \
	  status=$$?; slurm/testcluster down build/slurm; exit $$status

# The container image, by docker or whatever stands in for it (make image ENGINE=podman).
ENGINE := docker
image:
	$(ENGINE) build --build-arg REVISION=$$(git rev-parse HEAD)$$(git diff --quiet HEAD || echo +) --tag dl2pa .

# The same without an engine, as root on a Debian: built, and run as a nameless user on a read-only file system.
docker-test: setup
	docker/build-test build/docker

test: setup
	$(BIN)/python -m pytest $(WORKERS)

# The long variations that `test` leaves out.
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
