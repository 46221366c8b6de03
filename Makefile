# The whole toolbox; `make help` lists it.  Everything installs itself below $(VENV) first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SCRIPTS := docker/build docker/certificates docker/engine docker/entrypoint docker/materials
PROTOS := $(shell find proto/hmm_proto -name '*.proto')
PYTEST ?= -m pytest
PYTEST_ARGS ?=
TEST_PROCESSES ?= auto
REPLAY_ARGS ?=
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# $(call need,CHECK,PACKAGES): install Debian packages where CHECK fails and root can, else name them.
define need
@$(1) >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(2) >/dev/null; } || \
	{ echo "hmmd needs $(2): sudo apt-get install -y $(2)" >&2; exit 1; }
endef

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 12

# --- Installation

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hmmd needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(call need,$(PYTHON) -c 'import ensurepip',python3-venv)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(BIN)/python pyproject.toml requirements.lock requirements-build.lock
	$(PIP) install -q --require-hashes -r requirements.lock -r requirements-build.lock
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml requirements-dev.lock
	$(PIP) install -q --require-hashes -r requirements-dev.lock
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/.runtime

# Installing generates the stubs too: this is for .proto files edited since.
$(VENV)/.stubs: proto/hatch_build.py $(PROTOS)
	$(BIN)/python proto/hatch_build.py
	@touch $@

.PHONY: install-runtime install-dev
install-runtime: $(VENV)/.runtime
	@$(MAKE) -s $(VENV)/.stubs

install-dev: $(VENV)/.dev
	@$(MAKE) -s $(VENV)/.stubs

# --- What a user runs

.PHONY: demo test
demo: install-runtime ## Replay a real program's memory calls with devices attached
	$(BIN)/hmmctl replay $(REPLAY_ARGS)

test: install-dev ## Run every test, shared by a process for each CPU; PYTEST_ARGS="tests/hmm -k fault" selects
	$(call need,command -v strace,strace)
	$(call need,command -v npm,nodejs npm)
	$(call need,command -v promtool,prometheus)
	$(BIN)/python $(PYTEST) --numprocesses=$(TEST_PROCESSES) --maxprocesses=8 --dist=worksteal $(PYTEST_ARGS)

# --- What a developer runs

.PHONY: proto format lint lint-python lint-layers lint-proto lint-docker lint-shell type check bench simulate verify lock clean
proto: install-dev ## Generate the stubs of proto/hmm_proto/**/*.proto
	$(BIN)/python proto/hatch_build.py

format: install-dev ## Format Python and proto files, apply safe lint fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/buf format -w proto

lint: lint-python lint-layers lint-proto lint-docker lint-shell ## Check style, layers, wire format, Dockerfile and scripts

lint-python: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-layers: install-dev
	$(BIN)/lint-imports

lint-proto: install-dev
	$(BIN)/buf lint proto
	$(BIN)/buf format -d --exit-code proto

lint-docker: install-dev
	$(BIN)/hadolint docker/Dockerfile

lint-shell: install-dev
	$(BIN)/shellcheck .ci/run $(SCRIPTS)

type: install-dev ## Check types, strictly
	$(BIN)/mypy

check: lint type test ## Lint, types and tests, as before a commit; .ci/run adds packaging, the demo and coverage

bench: install-dev ## Measure, as ratios within one run
	$(call need,command -v cc,gcc libc6-dev)
	$(BIN)/python tests/bench $(BENCH_ARGS)

LOCK := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-emit-find-links --upgrade
lock: install-dev ## Resolve the three lock files anew
	$(LOCK) pyproject.toml --extra dev -o requirements-dev.lock
	$(LOCK) pyproject.toml -c requirements-dev.lock -o requirements.lock
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' | \
		$(LOCK) - -c requirements-dev.lock -o requirements-build.lock

CERTIFY_SEEDS ?= 0:1000
CERTIFIED ?=
.PHONY: certify
certify: install-dev ## Certify each of our drivers with a thousand storms; CERTIFY_SEEDS=FIRST:END and CERTIFIED select
	$(call need,command -v npm,nodejs npm)
	npm --prefix tests/system/javascript ci --silent
	$(BIN)/python tests/certify $(CERTIFY_SEEDS) $(CERTIFIED)

SEEDS ?= 0:10000
TOWNS ?=
SIMULATE_ARGS ?=
simulate: install-dev ## Run ten thousand seeded interleavings on all CPUs; SEEDS=FIRST:END and TOWNS select
	$(BIN)/python tests/simulation $(SEEDS) $(TOWNS) $(SIMULATE_ARGS)

.PHONY: selftest
selftest: install-dev ## Run the kernel's own selftest and the suite of 2015, the largest sizes and all repetitions included
	SELFTEST_ALL=1 $(BIN)/python $(PYTEST) tests/system/selftest tests/system/test_dummy_suite.py $(PYTEST_ARGS)

TRACES ?= tests/client/data/kernel-traces
verify: install-dev ## Compare the kernel's traces with a daemon, over the wire; TRACES selects
	$(BIN)/hmmctl verify $(TRACES)

clean: ## Remove what the tools above left, the environment included
	rm -rf $(VENV) .build build dist .coverage .coverage.* coverage.json .hypothesis .*_cache
	find hmm proto server client tests -name __pycache__ -prune -exec rm -rf {} +
	find proto -name '*_pb2*' -delete

# --- Containers

IMAGE ?= hmmd
ENGINE := PYTHON=$(BIN)/python docker/engine
ENGINE_PACKAGES := docker.io docker-compose mmdebstrap iproute2 iptables openssl

.PHONY: engine image image-test
engine: install-dev
	$(call need,docker/engine --check,$(ENGINE_PACKAGES))

image: engine ## Build the container image, with Docker, Podman or, for root on Debian, neither
	$(ENGINE) docker/build $(IMAGE)

image-test: image ## Run the image and both compose files, and test what runs
	HMMD_IMAGE=$(IMAGE) $(ENGINE) $(BIN)/python $(PYTEST) tests/docker/running $(PYTEST_ARGS)
