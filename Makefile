# Set up, serve, test. `make help` lists the targets and the variables.

VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/pip install -qq --no-deps --no-compile

# Bytecode is written once, by the first process that imports a module: --no-compile above leaves
# out what nobody imports. Some containers switch the writing off, and then each of a server's
# processes would compile all of vLLM and PyTorch again.
unexport PYTHONDONTWRITEBYTECODE

# The first Python that vLLM supports.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& command -v $$p && break; done)

# Asked only for a torch that pip's own sources (pip.conf, PIP_* variables) do not have.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
OUT ?= tuned
ARGS ?=

# For a server on a small CPU machine: KV cache in GiB, and nothing sent anywhere.
export VLLM_CPU_KVCACHE_SPACE ?= 2
export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1

# Compiled code is kept from one start to the next by PyTorch's own cache. The other way, vLLM's
# ahead-of-time artifacts, vLLM 0.32 writes on a CPU but cannot load again ("no attribute
# 'finalize_loading'"), so that it would compile anew at every start.
export VLLM_USE_AOT_COMPILE ?= 0
export TORCHINDUCTOR_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/depthpar/torchinductor

.DEFAULT_GOAL := help
.PHONY: help install serve chat demo tune test test-next test-deploy lint format lock clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'
	@echo
	@echo 'Variables (make serve MODEL=/models/llama ARGS="--dtype float32"):'
	@echo '  MODEL        checkpoint to serve         bundled SmolLM2-135M-Instruct'
	@echo '  ARGS         more arguments              none'
	@echo '  PORT, HOST   where to serve              $(PORT), $(HOST)'
	@echo '  PYTHON       a Python 3.11 to 3.14       $(PYTHON)'
	@echo '  TORCH_INDEX  where to get a CPU torch that'
	@echo '               pip cannot find itself      $(TORCH_INDEX)'

# Two stamps: the environment is made anew only when the lock changes.
LOCKED := $(VENV)/.locked
INSTALLED := $(VENV)/.installed

$(LOCKED): requirements/cpu.lock requirements/vllm-cpu-metadata/pyproject.toml
	@test -n "$(PYTHON)" || { echo 'No Python 3.11 to 3.14 found: name one with PYTHON=...' >&2; exit 1; }
	@echo 'Making $(VENV) with $(PYTHON) ...'
	@$(PYTHON) -m venv --clear $(VENV)
	@torch=$$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $<); echo "Installing $$torch ..."; \
	$(PIP) $$torch >$(VENV)/torch.log 2>&1 || { \
		echo "pip's own sources do not have it; asking $(TORCH_INDEX) ..."; \
		$(PIP) --index-url $(TORCH_INDEX) $$torch; }
	@echo 'Installing the other packages of $< (a few minutes) ...'
	@$(PIP) -r $<
	@$(PIP) --no-build-isolation ./requirements/vllm-cpu-metadata
	@touch $@

$(INSTALLED): $(LOCKED) pyproject.toml vllm_depthpar/__init__.py
	@$(PIP) --no-build-isolation --editable .
	@touch $@

install: $(INSTALLED) ## Make .venv with vLLM's CPU build and this package

serve: $(INSTALLED) ## Serve MODEL with parallel layers
	@set -e; model='$(MODEL)'; \
	if [ -z "$$model" ]; then \
		model=$$($(BIN)/python -m vllm_depthpar.checkpoint.bundled); \
		export HF_HUB_OFFLINE="$${HF_HUB_OFFLINE:-1}"; \
		set -- --served-model-name "$${model##*/}" --max-model-len 2048; \
	fi; \
	echo "Once it is up, talk to it from another terminal: make chat PORT=$(PORT)"; \
	exec $(BIN)/vllm serve "$$model" --model-impl depthpar --host $(HOST) --port $(PORT) "$$@" $(ARGS)

chat: $(INSTALLED) ## Chat with the server on PORT
	@$(BIN)/vllm chat --url http://$(HOST):$(PORT)/v1 $(ARGS)

demo: $(INSTALLED) ## Plan, one answer, and speed beside plain vLLM's
	@$(BIN)/python -m vllm_depthpar.cli.demo

tune: $(INSTALLED) ## Make a faster checkpoint of MODEL in OUT (tuned), with a page of how
	@set -e; model='$(MODEL)'; \
	[ -n "$$model" ] || model=$$($(BIN)/python -m vllm_depthpar.checkpoint.bundled); \
	exec $(BIN)/depthpar tune "$$model" --out '$(OUT)' $(or $(ARGS),--speedup 1.05 --minutes 12)

test: $(INSTALLED) ## Run the tests (ARGS="-k name" for some of them)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# In its output "vllm 0.33.0, kernels of vllm-cpu 0.32.0" is what was run on what.
test-next: $(INSTALLED) ## Run a choice of the tests on vLLM's next release (its Python, these kernels)
	@next=$$($(BIN)/python tests/harness/next_vllm.py) && \
	PYTHONPATH="$$next$${PYTHONPATH:+:$$PYTHONPATH}" VLLM_TARGET_DEVICE=cpu \
		$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m next $(ARGS)

# Not in $(VENV): Ray and the schemas are 300 MB, and vLLM behaves otherwise where it finds Ray.
test-deploy: $(INSTALLED) ## Run the tests that need Ray and Kubernetes' schemas
	@test -e $(VENV)-deploy/.installed || { set -e; \
		$(BIN)/python -m venv --clear $(VENV)-deploy; \
		packages() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(packages $(BIN)/python)')" \
			>"$$(packages $(VENV)-deploy/bin/python)/$(notdir $(VENV)).pth"; \
		$(VENV)-deploy/bin/pip install -qq --no-compile 'ray>=2.60,<3' 'kubernetes-validate>=1.37,<2'; \
		touch $(VENV)-deploy/.installed; }
	@$(VENV)-deploy/bin/python -m pytest tests/e2e/test_ray.py tests/unit/test_kubernetes.py $(ARGS)

lint: $(INSTALLED) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED) ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# uv does not read pip's configuration; where PIP_FIND_LINKS names a folder, torch is taken there.
lock: ## Resolve requirements/ again (ARGS=--upgrade: to the newest versions)
	@test -x $(VENV)-lock/bin/uv || { $(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip install --quiet uv; }
	@$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 \
		--custom-compile-command 'make lock' \
		$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu) \
		--overrides requirements/cpu.overrides --excludes requirements/cpu.excludes \
		--extra cpu --extra eval --extra recover --extra bench --extra dev requirements/cpu.in pyproject.toml \
		--output-file requirements/cpu.lock $(ARGS)

clean: ## Remove the environment and everything that tools left here
	rm -rf $(VENV) $(VENV)-deploy $(VENV)-lock .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	rm -rf requirements/vllm-cpu-metadata/build requirements/vllm-cpu-metadata/*.egg-info
	find vllm_depthpar tests -name __pycache__ -type d -prune -exec rm -rf {} +
